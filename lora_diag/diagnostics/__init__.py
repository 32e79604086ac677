"""One file per diagnostic: a layer's deltas → one frozen record.

The rule on the door: a diagnostic sees one layer and returns one record. It does not loop over layers, open a
checkpoint by path, print, or write.
"""
