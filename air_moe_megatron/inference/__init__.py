"""What a trained model is used for: continuing text, and measuring it on data; without its training flags."""
