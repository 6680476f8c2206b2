"""Models and their evaluation, and one file per stage."""
