"""Report: what a run did, for a person to look at. Reads the record; knows no torch."""
