"""Image towers side by side: equal parameters, equal training time, the same recipe, several seeds.

:mod:`~focalclip.comparison.towers` is the table of towers, :mod:`~focalclip.comparison.plan` fixes how long each is
trained, :mod:`~focalclip.comparison.cost` measures what a step costs, :mod:`~focalclip.comparison.runs` trains, and
:mod:`~focalclip.comparison.report` and :mod:`~focalclip.comparison.plot` show what came out.
"""
