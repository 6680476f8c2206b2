"""What is run with which numbers, where its results are, and the tables that they become."""
