"""The page of `lkd report`: run directories as one self-contained HTML file."""
