"""The command line: one verb a stage, and the programs that a person runs at a terminal."""
