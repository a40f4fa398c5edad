"""OpenAI's Responses without what needs a memory, as a translation of chats."""
