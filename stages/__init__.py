"""The programs: each builds what a stage needs from its configuration, runs it and saves the result."""

# The command that was typed, in the environment of the stages that it starts.
COMMAND_VARIABLE = "RLHF_COMMAND"
