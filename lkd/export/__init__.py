"""What others read: formats, teacher caches, packed sets, shared losses."""
