//! Snapshots on disk: round trip, damage, retention, which one a start takes.
