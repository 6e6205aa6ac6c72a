"""The programs: each builds what a stage needs from its configuration, runs it and saves the result."""
