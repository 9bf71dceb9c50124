//! Waits for a point in time to some tens of microseconds. Tokio's own timer counts in milliseconds, which is
//! more than many of the latencies that are measured from it.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A timer of the kernel.
pub(crate) struct Timer(AsyncFd<OwnedFd>);

impl Timer {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        // Its successor is `unsafe`, because a type's descriptor might change; that of an `OwnedFd` does not.
        #[expect(deprecated, reason = "sound with an OwnedFd")]
        let timer = AsyncFd::with_interest(timer, Interest::READABLE)?;
        Ok(Self(timer))
    }

    /// Waits until then; comes back at once when that is over. May be dropped while it waits.
    pub(crate) async fn until(&self, due: Instant) -> anyhow::Result<()> {
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let spec = Itimerspec {
            it_interval: timespec(Duration::ZERO)?,
            it_value: timespec(left)?,
        };
        // Setting it anew also takes back what an earlier wait left behind.
        timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &spec)?;
        loop {
            let mut ready = self.0.readable().await?;
            let mut count = [0; 8];
            match ready.try_io(|fd| Ok(rustix::io::read(fd, &mut count)?)) {
                Ok(read) => {
                    read?;
                    return Ok(());
                }
                Err(_would_block) => {}
            }
        }
    }
}

fn timespec(duration: Duration) -> anyhow::Result<Timespec> {
    Ok(Timespec {
        tv_sec: duration.as_secs().try_into()?,
        tv_nsec: duration.subsec_nanos().into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_waits_long_enough_and_not_for_what_is_over() {
        let timer = Timer::new().unwrap();
        let begin = Instant::now();
        timer.until(begin).await.unwrap();
        timer.until(begin + Duration::from_micros(1500)).await.unwrap();
        assert!(begin.elapsed() >= Duration::from_micros(1500));
        // A wait that is given up leaves nothing behind that ends the next one early.
        let short = timer.until(Instant::now() + Duration::from_millis(1));
        tokio::select! {
            biased;
            _ = short => unreachable!("a millisecond is not over at once"),
            () = std::future::ready(()) => {}
        }
        std::thread::sleep(Duration::from_millis(3));
        let due = Instant::now() + Duration::from_millis(5);
        timer.until(due).await.unwrap();
        assert!(Instant::now() >= due);
    }
}
