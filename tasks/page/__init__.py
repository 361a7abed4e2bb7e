"""The report page: facts in, one self-contained HTML text out (no files read but the templates)."""
