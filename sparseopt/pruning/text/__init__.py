"""Text as tokens: `documents` finds the texts that a short specification names, `windows` cuts them into windows."""
