"""Text as tokens: `documents` finds it, `chats` defines a document, `windows` cuts it."""
