"""Use a trained model without its training flags: continue text, measure it on data, or save it with another router."""
