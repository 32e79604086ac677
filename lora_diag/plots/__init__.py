"""Records → figures: one function a figure, each returning the Matplotlib ``Axes`` it drew on (extra ``[plot]``).

The rule on the door: the only room that imports Matplotlib; it measures nothing and opens no checkpoint.
"""
