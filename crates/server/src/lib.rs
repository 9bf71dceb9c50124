//! One node: REST, agent gateway, lease clock, reconcilers.
