//! The rules of [`Runtime`](super::Runtime) as a test suite for any implementation.
//!
//! A runtime's own tests implement [`Target`] (how to make the runtime again, and specifications that mean
//! "runs until told", "exits with 7", "cannot start" there) and call [`check`]. The suite is here, not
//! among one runtime's tests, because each of them owes the same: a rule that only one keeps is none.
//! It uses sessions named `conformance-*` and removes them; it needs an empty target.

use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use regent_types::{SessionName, Token};

use super::{
    Exit, Generation, HibernateMode, ObservedState, Runtime, RuntimeError, RuntimeEvent, StartSpec, Stop,
};
use crate::fence::FenceError;

/// How long an event may take to arrive: long, as it is only waited out by a runtime that fails.
const EVENT_WAIT: Duration = Duration::from_mins(1);

/// The grace of stops; the sessions of the suite end at once when asked.
const GRACE: Duration = Duration::from_secs(20);

/// After how long an action is cut off: at once, within its first steps, and about when it is done.
const CUT_OFF_AFTER: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_millis(2),
    Duration::from_millis(10),
    Duration::from_millis(40),
    Duration::from_millis(150),
    Duration::from_millis(600),
];

/// What the suite needs to know of a runtime.
pub trait Target: Sync {
    /// Makes a runtime object for the same target, as an agent that was started again would.
    fn open(&self) -> Box<dyn Runtime>;

    /// A session that runs until it is told to end.
    fn sleeper(&self, session: SessionName) -> StartSpec;

    /// A session whose program ends by itself with code 7.
    fn exits_with_7(&self, session: SessionName) -> StartSpec;

    /// A session that can never start, because its program or image does not exist.
    fn broken(&self, session: SessionName) -> StartSpec;

    /// Everything at the target that belongs to the session, in words: processes, folders, containers,
    /// volumes that are not persistent. Empty when nothing is left.
    fn leftovers<'a>(&'a self, session: &'a SessionName) -> BoxFuture<'a, Vec<String>>;
}

/// A rule that was broken.
#[derive(Debug, thiserror::Error)]
#[error("{rule}: {what}")]
pub struct Violation {
    /// The rule, as a sentence.
    pub rule: &'static str,
    /// What was seen instead.
    pub what: String,
}

/// Runs the whole suite. Stops at the first rule that is broken.
pub async fn check(target: &dyn Target) -> Result<(), Violation> {
    start_and_stop_twice(target).await?;
    generations(target).await?;
    fencing(target).await?;
    hibernate_and_wake(target, HibernateMode::Stop).await?;
    hibernate_and_wake(target, HibernateMode::Restart).await?;
    exits(target).await?;
    adoption(target).await?;
    interruptions(target).await?;
    take_over(target).await?;
    roll_back(target).await
}

async fn start_and_stop_twice(target: &dyn Target) -> Result<(), Violation> {
    let rule = Rule("a start and a stop that come twice act once");
    let runtime = target.open();
    let spec = target.sleeper(name("twice"));
    rule.equal("list of an empty target", rule.ok(runtime.list().await)?.len(), 0)?;
    let first = rule.ok(runtime.start(&spec).await)?;
    let second = rule.ok(runtime.start(&spec).await)?;
    rule.equal("state", first.state, ObservedState::Running)?;
    rule.equal("details of the second start", &second, &first)?;
    rule.equal("list", rule.ok(runtime.list().await)?, vec![first])?;
    for _ in 0..2 {
        rule.ok(runtime.stop(&spec.session_ref(), Stop::within(GRACE)).await)?;
        rule.equal("list after a stop", rule.ok(runtime.list().await)?.len(), 0)?;
        rule.equal("what is left", target.leftovers(&spec.session).await, Vec::new())?;
    }
    // And the name is free again.
    rule.ok(runtime.start(&spec).await)?;
    rule.ok(runtime.stop(&spec.session_ref(), Stop::within(GRACE)).await)
}

async fn generations(target: &dyn Target) -> Result<(), Violation> {
    let rule = Rule("a newer generation replaces the older, an older one is refused");
    let runtime = target.open();
    let old = target.sleeper(name("generations"));
    let new = StartSpec {
        generation: old.generation + 1,
        ..old.clone()
    };
    let first = rule.ok(runtime.start(&old).await)?;
    let second = rule.ok(runtime.start(&new).await)?;
    rule.equal("generation", second.generation, new.generation)?;
    rule.that(
        "it is another program",
        first.pid.is_none() || first.pid != second.pid,
    )?;
    rule.equal("list", rule.ok(runtime.list().await)?, vec![second.clone()])?;
    let stale = |error: &RuntimeError| {
        matches!(error, RuntimeError::StaleGeneration { have, asked, .. }
            if *have == new.generation && *asked == old.generation)
    };
    rule.refused("start of the older", runtime.start(&old).await, stale)?;
    rule.refused(
        "stop of the older",
        runtime.stop(&old.session_ref(), Stop::within(GRACE)).await,
        stale,
    )?;
    rule.refused(
        "hibernate of the older",
        runtime.hibernate(&old.session_ref()).await,
        stale,
    )?;
    rule.refused("wake of the older", runtime.wake(&old.session_ref()).await, stale)?;
    rule.equal(
        "list after the refusals",
        rule.ok(runtime.list().await)?,
        vec![second],
    )?;
    rule.ok(runtime.stop(&new.session_ref(), Stop::within(GRACE)).await)
}

async fn fencing(target: &dyn Target) -> Result<(), Violation> {
    let rule = Rule("an older fencing token is refused, also by an agent that was started again");
    let runtime = target.open();
    let spec = target.sleeper(name("fencing"));
    let newer = Token(spec.token.0 + 1);
    rule.ok(runtime.start(&spec).await)?;
    let raised = StartSpec {
        token: newer,
        ..target.sleeper(name("fencing-newer"))
    };
    rule.ok(runtime.start(&raised).await)?;
    drop(runtime);
    let runtime = target.open();
    let fenced = |error: &RuntimeError| {
        !error.is_retryable()
            && matches!(error, RuntimeError::Fence(FenceError::Fenced { highest, .. }) if *highest == newer)
    };
    let other = StartSpec {
        token: spec.token,
        ..target.sleeper(name("fencing-third"))
    };
    rule.refused("start", runtime.start(&other).await, fenced)?;
    rule.refused(
        "stop",
        runtime.stop(&spec.session_ref(), Stop::within(GRACE)).await,
        fenced,
    )?;
    rule.refused("hibernate", runtime.hibernate(&spec.session_ref()).await, fenced)?;
    rule.refused("wake", runtime.wake(&spec.session_ref()).await, fenced)?;
    rule.equal("sessions", rule.ok(runtime.list().await)?.len(), 2)?;
    for session in [&spec, &raised] {
        let mut session = session.session_ref();
        session.token = newer;
        rule.ok(runtime.stop(&session, Stop::within(GRACE)).await)?;
    }
    Ok(())
}

async fn hibernate_and_wake(target: &dyn Target, mode: HibernateMode) -> Result<(), Violation> {
    let rule = Rule("hibernate and wake that come twice act once, and a restarted agent sees the state");
    let runtime = target.open();
    let spec = StartSpec {
        hibernate: Some(mode),
        ..newest(target.sleeper(name("hibernate")))
    };
    let session = spec.session_ref();
    let missing = |error: &RuntimeError| matches!(error, RuntimeError::NotFound { .. });
    rule.refused("hibernate of nothing", runtime.hibernate(&session).await, missing)?;
    rule.refused("wake of nothing", runtime.wake(&session).await, missing)?;
    let started = rule.ok(runtime.start(&spec).await)?;
    let mut events = runtime.watch();
    for _ in 0..2 {
        let hibernated = rule.ok(runtime.hibernate(&session).await)?;
        rule.equal("state", hibernated.state, ObservedState::Hibernated)?;
    }
    let again = rule.ok(runtime.start(&spec).await)?;
    rule.equal(
        "state after a start that came again",
        again.state,
        ObservedState::Hibernated,
    )?;
    let other = target.open();
    let listed = rule.ok(other.list().await)?;
    rule.equal(
        "state in the list",
        listed.first().map(|s| s.state),
        Some(ObservedState::Hibernated),
    )?;
    for _ in 0..2 {
        let awake = rule.ok(other.wake(&session).await)?;
        rule.equal("state", awake.state, ObservedState::Running)?;
        if mode == HibernateMode::Stop {
            rule.equal("the program", awake.pid, started.pid)?;
        }
    }
    let listed = rule.ok(runtime.list().await)?;
    rule.equal(
        "state in the list",
        listed.first().map(|s| s.state),
        Some(ObservedState::Running),
    )?;
    // Hibernating and stopping are not exits.
    rule.ok(runtime.stop(&session, Stop::within(GRACE)).await)?;
    let last = newest(target.exits_with_7(name("hibernate-end")));
    rule.ok(runtime.start(&last).await)?;
    rule.equal(
        "the first event",
        exited(rule, &mut events).await?.0,
        last.session.clone(),
    )?;
    rule.ok(runtime.stop(&last.session_ref(), Stop::within(GRACE)).await)?;
    rule.equal("what is left", target.leftovers(&spec.session).await, Vec::new())
}

async fn exits(target: &dyn Target) -> Result<(), Violation> {
    let rule = Rule("an exit is told with its code, stays visible until a stop, and is not started again");
    let runtime = target.open();
    let mut events = runtime.watch();
    let spec = newest(target.exits_with_7(name("exits")));
    rule.ok(runtime.start(&spec).await)?;
    let event = exited(rule, &mut events).await?;
    rule.equal(
        "event",
        event,
        (spec.session.clone(), spec.generation, Exit::Code(7)),
    )?;
    let gone = ObservedState::Exited(Exit::Code(7));
    let again = rule.ok(runtime.start(&spec).await)?;
    rule.equal("state after a start that came again", again.state, gone)?;
    let listed = rule.ok(target.open().list().await)?;
    rule.equal(
        "state in the list",
        listed.iter().map(|s| s.state).collect(),
        vec![gone],
    )?;
    let wrong = |error: &RuntimeError| matches!(error, RuntimeError::WrongState { .. });
    rule.refused("hibernate", runtime.hibernate(&spec.session_ref()).await, wrong)?;
    rule.refused("wake", runtime.wake(&spec.session_ref()).await, wrong)?;
    rule.ok(runtime.stop(&spec.session_ref(), Stop::within(GRACE)).await)?;
    rule.equal("what is left", target.leftovers(&spec.session).await, Vec::new())
}

async fn adoption(target: &dyn Target) -> Result<(), Violation> {
    let rule = Rule("a restarted agent finds what runs, goes on with it and is told of its exits");
    let runtime = target.open();
    let spec = newest(target.sleeper(name("adoption")));
    let started = rule.ok(runtime.start(&spec).await)?;
    drop(runtime);
    let runtime = target.open();
    rule.equal("list", rule.ok(runtime.list().await)?, vec![started.clone()])?;
    rule.equal(
        "a start that comes again",
        rule.ok(runtime.start(&spec).await)?,
        started,
    )?;
    rule.ok(runtime.stop(&spec.session_ref(), Stop::within(GRACE)).await)?;
    rule.equal("what is left", target.leftovers(&spec.session).await, Vec::new())
}

/// An agent that is killed in the middle of an action never hears what came of it; the next one does the action
/// again, whatever the first had done by then.
async fn interruptions(target: &dyn Target) -> Result<(), Violation> {
    let rule = Rule("an action that was cut off anywhere can be done again, and leaves nothing twice");
    let spec = newest(target.sleeper(name("cut-off")));
    let session = spec.session_ref();
    for after in CUT_OFF_AFTER {
        let cut = |what| tracing::debug!(what, ?after, "is cut off");
        cut("start");
        cut_off(after, target.open().start(&spec)).await;
        let runtime = target.open();
        let started = rule.ok(runtime.start(&spec).await)?;
        rule.equal("state", started.state, ObservedState::Running)?;
        rule.equal("sessions", rule.ok(runtime.list().await)?.len(), 1)?;
        cut("hibernate");
        cut_off(after, target.open().hibernate(&session)).await;
        let asleep = rule.ok(runtime.hibernate(&session).await)?;
        rule.equal("state", asleep.state, ObservedState::Hibernated)?;
        cut("wake");
        cut_off(after, target.open().wake(&session)).await;
        let awake = rule.ok(runtime.wake(&session).await)?;
        rule.equal("state", awake.state, ObservedState::Running)?;
        rule.equal("sessions", rule.ok(target.open().list().await)?.len(), 1)?;
        cut("stop");
        cut_off(after, target.open().stop(&session, Stop::within(GRACE))).await;
        rule.ok(runtime.stop(&session, Stop::within(GRACE)).await)?;
        rule.equal("what is left", target.leftovers(&spec.session).await, Vec::new())?;
    }
    Ok(())
}

/// Begins an action and drops it after a while.
async fn cut_off<T>(after: Duration, action: BoxFuture<'_, T>) {
    // Done in time or not, nobody looks at what came of it.
    let _ = tokio::time::timeout(after, action).await;
}

/// The last but one rule, since the fence stays where it was raised to.
async fn take_over(target: &dyn Target) -> Result<(), Violation> {
    let rule = Rule("who takes over locks out who led before, and finds and ends what that one started");
    let (before, after) = (target.open(), target.open());
    let spec = newest(target.sleeper(name("taken-over")));
    let started = rule.ok(before.start(&spec).await)?;
    let newer = latest(spec.token);
    rule.ok(after.take_over(newer).await)?;
    rule.ok(after.take_over(newer).await)?;
    rule.equal("list", rule.ok(after.list().await)?, vec![started])?;
    let fenced = |error: &RuntimeError| matches!(error, RuntimeError::Fence(_));
    let mut session = spec.session_ref();
    let late = newest(target.sleeper(name("too-late")));
    rule.refused("a late start", before.start(&late).await, fenced)?;
    rule.refused("a late hibernate", before.hibernate(&session).await, fenced)?;
    rule.refused(
        "a late stop",
        before.stop(&session, Stop::within(GRACE)).await,
        fenced,
    )?;
    rule.refused("a late takeover", before.take_over(spec.token).await, fenced)?;
    session.token = newer;
    rule.ok(after.stop(&session, Stop::within(GRACE)).await)?;
    for spec in [&spec, &late] {
        rule.equal("what is left", target.leftovers(&spec.session).await, Vec::new())?;
    }
    Ok(())
}

async fn roll_back(target: &dyn Target) -> Result<(), Violation> {
    let rule = Rule("a start that fails says why, for good, and leaves nothing");
    let runtime = target.open();
    let mut spec = target.broken(name("broken"));
    spec.token = latest(newest(spec.clone()).token);
    for _ in 0..2 {
        rule.refused("start", runtime.start(&spec).await, |error| !error.is_retryable())?;
        rule.equal("what is left", target.leftovers(&spec.session).await, Vec::new())?;
        rule.equal("sessions", rule.ok(runtime.list().await)?.len(), 0)?;
    }
    Ok(())
}

fn name(what: &str) -> SessionName {
    SessionName::new(format!("conformance-{what}")).expect("lower-case words joined by a dash")
}

/// The token that [`take_over`] raises the fence to, from that of the rules before it.
fn latest(token: Token) -> Token {
    Token(token.0 + 1)
}

/// The token that [`fencing`] has raised the fence to.
fn newest(mut spec: StartSpec) -> StartSpec {
    spec.token.0 += 1;
    spec
}

async fn exited(
    rule: Rule,
    events: &mut BoxStream<'static, RuntimeEvent>,
) -> Result<(SessionName, Generation, Exit), Violation> {
    let news = |event: &RuntimeEvent| {
        !matches!(
            event,
            RuntimeEvent::Progress { .. } | RuntimeEvent::Changed { .. }
        )
    };
    let mut exits = events.filter(|event| std::future::ready(news(event)));
    match tokio::time::timeout(EVENT_WAIT, exits.next()).await {
        Ok(Some(RuntimeEvent::Exited {
            session,
            generation,
            exit,
            ..
        })) => Ok((session, generation, exit)),
        Ok(other) => Err(rule.broken(format!("instead of an exit came {other:?}"))),
        Err(_) => Err(rule.broken("no event came".to_owned())),
    }
}

#[derive(Clone, Copy)]
struct Rule(&'static str);

impl Rule {
    fn broken(self, what: String) -> Violation {
        Violation { rule: self.0, what }
    }

    fn ok<T>(self, result: Result<T, RuntimeError>) -> Result<T, Violation> {
        result.map_err(|error| self.broken(format!("{error} ({error:?})")))
    }

    fn that(self, what: &str, holds: bool) -> Result<(), Violation> {
        if holds {
            Ok(())
        } else {
            Err(self.broken(format!("not true: {what}")))
        }
    }

    #[expect(
        clippy::needless_pass_by_value,
        reason = "values made for the comparison read better"
    )]
    fn equal<T: PartialEq + std::fmt::Debug>(self, what: &str, is: T, should: T) -> Result<(), Violation> {
        if is == should {
            Ok(())
        } else {
            Err(self.broken(format!("{what} is {is:?}, should be {should:?}")))
        }
    }

    fn refused<T: std::fmt::Debug>(
        self,
        what: &str,
        result: Result<T, RuntimeError>,
        right: impl Fn(&RuntimeError) -> bool,
    ) -> Result<(), Violation> {
        match result {
            Err(error) if right(&error) => Ok(()),
            Err(error) => Err(self.broken(format!("{what} was refused for another reason: {error:?}"))),
            Ok(done) => Err(self.broken(format!("{what} was not refused: {done:?}"))),
        }
    }
}
