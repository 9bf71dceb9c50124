//! What a node tells the service manager that started it (`Type=notify` of systemd); nothing where there is none.

use sd_notify::NotifyState;

/// The node serves: what waits for the unit may start.
pub(crate) fn ready() {
    tell(&[NotifyState::Ready, NotifyState::Status("serving")]);
}

/// The node ends in order.
pub(crate) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// A manager that does not listen is no reason not to serve.
fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}
