"""Loss spikes and silent corruption: detection, skipped updates, rollback."""
