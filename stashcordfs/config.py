"""Settings, validated once."""
