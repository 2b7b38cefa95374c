"""The engine over Qdrant, in a folder or on a server."""
