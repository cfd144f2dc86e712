"""The store that several processes share: PostgreSQL through asyncpg."""
