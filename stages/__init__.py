"""The programs: each builds what a stage needs from its configuration, runs it and saves the result."""

COMMAND_VARIABLE = "RLHF_COMMAND"  # the command of stage=all, in the environment of its stages
