"""Choose AIR's sizes for a checkpoint by measuring them on its own tokens; see docs/tools.md.

``capture.py`` collects what the routers score, ``recall.py`` fits codebooks and measures lists, ``baselines.py`` does
so for groups and product keys, ``search.py`` walks the grid of sizes, ``output.py`` writes table, CSV and plot.
"""
