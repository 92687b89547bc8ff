"""Choose AIR's sizes for a checkpoint by measuring them on its own tokens; see docs/tools.md.

``capture.py`` collects the tokens that routers score, ``recall.py`` fits codebooks and measures lists, ``baselines.py``
measures groups and product keys, ``search.py`` walks the grid of sizes, ``output.py`` writes table, CSV and plot.
"""
