"""One self-contained page from the files that training runs leave: ``python -m air_moe_megatron.report RUN_DIR...``.

It needs pandas, matplotlib and Jinja2, and loads them only when it runs. What the page shows is in docs/report.md.
"""
