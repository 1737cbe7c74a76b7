"""Measuring the layer against others in one run: ``python -m syncbn.bench MODE --help``.

Each mode is the file of its name. What they share: the shapes (``cases``), the layers that are compared
(``implementations``), clocks and interleaving (``timing``), the bytes that must be moved (``traffic``), processes
(``processes``), the result (``report``) and its picture (``plot``).
"""
