"""Text as tokens: `documents` finds it, `chats` says what a document is, `windows` cuts it."""
