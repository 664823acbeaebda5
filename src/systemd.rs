//! The word to systemd: readiness, reloads, one line of status, the watchdog. Without systemd every call does nothing.

use std::time::Duration;

use sd_notify::NotifyState;

/// How long each half of a start may take beyond systemd's own patience: up to 100 golden images of a large model on a slow board, and the
/// ledger's check after a crash, on a slow card.
const LONG_START: Duration = Duration::from_mins(30);

/// Whether there is a service manager to tell.
pub fn listens() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// How long this process may go without [`alive`] until it is started again; `None` without a watchdog.
pub fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled().filter(|time| !time.is_zero())
}

/// Everything runs; also the end of [`reloading`].
pub fn ready() {
    notify(&[NotifyState::Ready]);
}

/// The configuration is being read again; [`ready`] ends it.
pub fn reloading() {
    // systemd 253 and later want the time beside it.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
}

/// The end has begun.
pub fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// A half of the start that may take long begins: the model, then the ledger.
pub fn starting() {
    let micros = u32::try_from(LONG_START.as_micros()).unwrap_or(u32::MAX);
    notify(&[NotifyState::ExtendTimeoutUsec(micros)]);
}

/// Work gets on: the watchdog waits anew.
pub fn alive() {
    notify(&[NotifyState::Watchdog]);
}

/// One line for `systemctl status`.
pub fn status(line: &str) {
    notify(&[NotifyState::Status(line)]);
}

fn notify(states: &[NotifyState<'_>]) {
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(states);
}
