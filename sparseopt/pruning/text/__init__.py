"""Text as tokens: `documents` finds what a short specification names, `chats` reads it, `windows` cuts windows."""
