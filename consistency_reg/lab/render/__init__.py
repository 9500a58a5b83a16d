"""Draw tables and figures for the commands: on a terminal, as Markdown, as PNG and on one HTML page."""
