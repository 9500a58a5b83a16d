"""The arguments of every command, one module each; nothing heavy is imported, so that help comes at once."""
