"""Choose AIR's sizes for a checkpoint by measuring them on its own tokens; see docs/tools.md.

``capture.py`` collects the tokens that routers score, ``recall.py`` fits codebooks and measures lists, ``baselines.py``
measures groups and product keys, and ``search.py`` walks the grid of sizes. ``measured.py`` holds what was measured,
``report.py`` writes it as text, and ``output.py`` as CSV file and plot.
"""
