"""What a reader sees of results: the report, and the notebook to play with."""
