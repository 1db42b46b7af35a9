"""Change data capture for PostgreSQL tables: triggers write the book, NOTIFY rings the bell, a daemon delivers."""
