//! What the watch knows of the namespace, and what of it was told.
//!
//! Pure: it is handed events and the time, and hands back news. Invariant: news comes from comparing what is there
//! with what was told, never from an event as such, so it makes no difference whether a change was seen as it
//! happened or in the list that a broken watch begins again with.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::runtime::watcher::Event;
use regent_agent::runtime::{Exit, Generation, RuntimeEvent};
use regent_types::{SessionName, Token};
use tokio::time::Instant;

use crate::engine::unreadable;
use crate::found::Found;
use crate::names::label;
use crate::pods::Condition;
use crate::record::{Phase, Record};

/// How long something must be wrong before it is told: the two watches are not in step, and a pod that is replaced
/// at once is nobody's business.
const TROUBLE_LASTS: Duration = Duration::from_secs(3);

/// What a review found.
#[derive(Debug, PartialEq)]
pub(crate) enum News {
    /// To be told.
    Tell(RuntimeEvent),
    /// A session has ended by itself, and it is not on record yet. Comes again until it is.
    RecordEnd(SessionName, Generation),
    /// A session runs whose start or wake was cut off before it could say so. Comes again until it is on record.
    RecordUp(SessionName, Generation),
}

/// What the watch knows.
#[derive(Debug, Default)]
pub(crate) struct Mirror {
    deployments: Shelf<Deployment>,
    pods: Shelf<Pod>,
    told: BTreeMap<SessionName, Told>,
    /// Whether everything was looked at once. What ended before that is told by lists.
    reviewed: bool,
}

/// Objects by session and name.
#[derive(Debug)]
struct Shelf<K> {
    there: BTreeMap<(String, String), K>,
    /// A new list that is coming in.
    coming: BTreeMap<(String, String), K>,
    complete: bool,
}

impl<K> Default for Shelf<K> {
    fn default() -> Self {
        Self {
            there: BTreeMap::new(),
            coming: BTreeMap::new(),
            complete: false,
        }
    }
}

impl<K: ResourceExt> Shelf<K> {
    /// Takes an event in. Gives the sessions that it concerns.
    fn take(&mut self, event: Event<K>) -> Vec<SessionName> {
        let key = |object: &K| {
            let session = object.labels().get(label::SESSION);
            session.map(|session| (session.clone(), object.name_any()))
        };
        let mut keys = Vec::new();
        match event {
            Event::Init => self.coming.clear(),
            Event::InitApply(object) => {
                if let Some(key) = key(&object) {
                    self.coming.insert(key, object);
                }
            }
            Event::InitDone => {
                let before = std::mem::replace(&mut self.there, std::mem::take(&mut self.coming));
                self.complete = true;
                keys.extend(before.into_keys().chain(self.there.keys().cloned()));
            }
            Event::Apply(object) => {
                if let Some(key) = key(&object) {
                    keys.push(key.clone());
                    self.there.insert(key, object);
                }
            }
            Event::Delete(object) => {
                if let Some(key) = key(&object) {
                    self.there.remove(&key);
                    keys.push(key);
                }
            }
        }
        keys.dedup_by(|a, b| a.0 == b.0);
        keys.into_iter()
            .filter_map(|(session, _)| SessionName::new(session).ok())
            .collect()
    }

    fn of<'a>(&'a self, session: &'a SessionName) -> impl Iterator<Item = &'a K> {
        let first = (session.to_string(), String::new());
        self.there
            .range(first..)
            .take_while(move |((of, _), _)| of == session.as_str())
            .map(|(_, object)| object)
    }
}

/// What was told of one generation of a session.
#[derive(Debug)]
struct Told {
    generation: Generation,
    token: Token,
    /// That it ended.
    ended: bool,
    /// Whether an action is under way that tells for itself if the session vanishes.
    quiet: bool,
    /// What is wrong with it.
    trouble: Option<String>,
    /// What is wrong since when, not told yet.
    doubt: Option<(String, Instant)>,
    /// Since when it runs without that being on record.
    runs_since: Option<Instant>,
}

impl Told {
    fn nothing(record: &Record) -> Self {
        Self {
            generation: record.generation,
            token: record.started_token,
            ended: false,
            quiet: false,
            trouble: None,
            doubt: None,
            runs_since: None,
        }
    }

    /// The end, unless it was told.
    fn end(&mut self, session: &SessionName, exit: Exit) -> Option<News> {
        if std::mem::replace(&mut self.ended, true) {
            return None;
        }
        Some(News::Tell(RuntimeEvent::Exited {
            session: session.clone(),
            generation: self.generation,
            token: self.token,
            exit,
        }))
    }

    /// What is to be told of what is wrong now: something else than before that lasts, or that it is over.
    fn trouble(&mut self, now: Instant, trouble: Option<String>) -> Option<String> {
        let Some(words) = trouble else {
            self.doubt = None;
            return self.trouble.take().map(|_| "it is well again".to_owned());
        };
        if self.trouble.as_deref().is_some_and(|told| is_same(told, &words)) {
            self.doubt = None;
            return None;
        }
        match &self.doubt {
            Some((doubt, since)) if is_same(doubt, &words) => {
                if now - *since < TROUBLE_LASTS {
                    return None;
                }
                self.doubt = None;
                self.trouble = Some(words.clone());
                Some(words)
            }
            _ => {
                self.doubt = Some((words, now));
                None
            }
        }
    }
}

/// Whether two texts tell of one trouble. A pull that fails and backs off by turns is one, and so is a lack of nodes
/// whose number changes.
fn is_same(one: &str, other: &str) -> bool {
    let kind = |text: &str| text.split_once(": ").map_or(text, |(kind, _)| kind).to_owned();
    kind(one) == kind(other)
}

impl Mirror {
    /// Takes in what the watch of Deployments tells. Gives the sessions that it concerns.
    pub(crate) fn deployment(&mut self, event: Event<Deployment>) -> Vec<SessionName> {
        if let Event::Delete(last) = &event
            && let Ok(record) = Record::read(last)
            && let Some(told) = self.told.get_mut(&record.session)
        {
            // Its last words may be the first that are heard of a stop.
            told.quiet |= record.phase == Phase::Stopping;
        }
        self.deployments.take(event)
    }

    /// Takes in what the watch of pods tells. Gives the sessions that it concerns.
    pub(crate) fn pod(&mut self, event: Event<Pod>) -> Vec<SessionName> {
        self.pods.take(event)
    }

    /// Compares what is there with what was told, for some sessions, or for all of them. `begun` says of which
    /// ends, seen in the first review, nobody can know yet.
    pub(crate) fn review(
        &mut self,
        sessions: Option<Vec<SessionName>>,
        now: Instant,
        namespace: &str,
        begun: impl Fn(&SessionName, Generation) -> bool,
    ) -> Vec<News> {
        if !(self.deployments.complete && self.pods.complete) {
            return Vec::new();
        }
        let first = !std::mem::replace(&mut self.reviewed, true);
        let sessions = sessions.filter(|_| !first).unwrap_or_else(|| self.all());
        sessions
            .iter()
            .flat_map(|session| self.review_one(session, now, namespace, first, &begun))
            .collect()
    }

    /// The sessions that are there, and those that were.
    fn all(&self) -> Vec<SessionName> {
        let there = self.deployments.there.keys();
        let mut all: Vec<SessionName> = there
            .filter_map(|(session, _)| SessionName::new(session).ok())
            .chain(self.told.keys().cloned())
            .collect();
        all.sort();
        all.dedup();
        all
    }

    fn review_one(
        &mut self,
        session: &SessionName,
        now: Instant,
        namespace: &str,
        first: bool,
        begun: &impl Fn(&SessionName, Generation) -> bool,
    ) -> Vec<News> {
        let record = self.deployments.of(session).next().and_then(|deployment| {
            Record::read(deployment)
                .inspect_err(|reason| unreadable(deployment, reason))
                .ok()
        });
        // Deleted by somebody who did not say so before: it is over, though its pod may still be there.
        let record = record.filter(|record| !record.going || record.phase == Phase::Stopping);
        let Some(record) = record else {
            let told = self.told.remove(session).filter(|told| !told.quiet);
            return told
                .and_then(|mut told| told.end(session, Exit::Removed))
                .into_iter()
                .collect();
        };
        let found = Found {
            pods: self.pods.of(session).cloned().collect(),
            record,
        };
        let record = &found.record;
        let told = self
            .told
            .entry(session.clone())
            .or_insert_with(|| Told::nothing(record));
        if told.generation != record.generation {
            *told = Told::nothing(record);
        }
        told.quiet = matches!(record.phase, Phase::Starting | Phase::Stopping);
        let mut news = Vec::new();
        match (&record.phase, found.condition()) {
            (Phase::Ended(ended), _) => {
                let exited = told.end(session, ended.exit);
                news.extend(exited.filter(|_| !first || begun(session, record.generation)));
            }
            (Phase::Starting | Phase::Started | Phase::Waking, Some(Condition::Ended(ended))) => {
                news.extend(told.end(session, ended.exit));
                news.push(News::RecordEnd(session.clone(), record.generation));
            }
            (Phase::Started, condition) if record.replicas > 0 => {
                if let Some(reason) = told.trouble(now, trouble(condition, record.failure.as_deref())) {
                    news.push(News::Tell(RuntimeEvent::Changed {
                        observed: Box::new(found.observed(namespace)),
                        reason,
                    }));
                }
            }
            (Phase::Starting | Phase::Waking, Some(Condition::Ready | Condition::NotReady)) => {
                let since = *told.runs_since.get_or_insert(now);
                // Whoever waits for it has said so by then.
                if now - since >= record.ready_within + TROUBLE_LASTS {
                    news.push(News::RecordUp(session.clone(), record.generation));
                }
                return news;
            }
            (Phase::Starting | Phase::Started | Phase::Waking | Phase::Hibernated | Phase::Stopping, _) => {
                (told.ended, told.trouble, told.doubt) = (false, None, None);
            }
        }
        told.runs_since = None;
        news
    }
}

/// What is wrong with a session that should run.
fn trouble(condition: Option<Condition>, failure: Option<&str>) -> Option<String> {
    match (condition, failure) {
        (Some(Condition::Ready | Condition::Ended(_)), _) => None,
        (Some(Condition::NotReady), _) => Some("it runs, but does not answer on its port".to_owned()),
        (Some(Condition::Stuck { why, .. }), _) => Some(why),
        (None, Some(failure)) => Some(format!("its pod cannot be created: {failure}")),
        (Some(Condition::Coming) | None, _) => {
            Some("its pod is gone, and Kubernetes makes another".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::names::{CONTAINER, annotation};

    struct Scene {
        mirror: Mirror,
        start: Instant,
    }

    impl Scene {
        fn new(deployments: Vec<Deployment>, pods: Vec<Pod>) -> Self {
            let mut scene = Self {
                mirror: Mirror::default(),
                start: Instant::now(),
            };
            scene.list(deployments, pods);
            scene
        }

        fn list(&mut self, deployments: Vec<Deployment>, pods: Vec<Pod>) {
            self.mirror.deployment(Event::Init);
            for one in deployments {
                self.mirror.deployment(Event::InitApply(one));
            }
            self.mirror.deployment(Event::InitDone);
            self.mirror.pod(Event::Init);
            for one in pods {
                self.mirror.pod(Event::InitApply(one));
            }
            self.mirror.pod(Event::InitDone);
        }

        /// The news of a review of all, in words, so many seconds after the beginning.
        fn news(&mut self, second: u64) -> Vec<String> {
            self.news_where(second, false)
        }

        fn news_where(&mut self, second: u64, begun: bool) -> Vec<String> {
            let now = self.start + Duration::from_secs(second);
            let news = self.mirror.review(None, now, "ns", |_, _| begun);
            news.into_iter()
                .map(|news| match news {
                    News::Tell(RuntimeEvent::Exited { generation, exit, .. }) => {
                        format!("{generation} {exit}")
                    }
                    News::Tell(RuntimeEvent::Changed { reason, .. }) => reason,
                    News::Tell(other) => format!("{other:?}"),
                    News::RecordEnd(session, _) => format!("record the end of {session}"),
                    News::RecordUp(session, _) => format!("record that {session} is up"),
                })
                .collect()
        }
    }

    fn deployment(phase: &Phase) -> Deployment {
        let mut deployment = json!({
            "metadata": {
                "name": "d", "uid": "u",
                "labels": { label::SESSION: "s", label::GENERATION: "1" },
                "annotations": { annotation::SESSION: "s", annotation::STARTED_TOKEN: "5" },
            },
            "spec": { "selector": {}, "template": {} },
        });
        let patch = phase.patch();
        deployment["spec"]["replicas"] = patch["spec"]["replicas"].clone();
        for (name, value) in patch["metadata"]["annotations"].as_object().unwrap() {
            if !value.is_null() {
                deployment["metadata"]["annotations"][name] = value.clone();
            }
        }
        serde_json::from_value(deployment).unwrap()
    }

    fn pod(container: &Value) -> Pod {
        let mut status = json!({ "name": CONTAINER, "image": "i", "imageID": "", "restartCount": 0 });
        status
            .as_object_mut()
            .unwrap()
            .extend(container.as_object().unwrap().clone());
        serde_json::from_value(json!({
            "metadata": { "name": "p", "labels": { label::SESSION: "s", label::GENERATION: "1" } },
            "status": { "phase": "Running", "containerStatuses": [status] },
        }))
        .unwrap()
    }

    fn ready() -> Pod {
        pod(&json!({ "ready": true, "state": { "running": {} } }))
    }

    fn ended() -> Pod {
        pod(&json!({
            "ready": false, "state": { "terminated": { "exitCode": 7, "startedAt": "2026-01-01T00:00:00Z" } },
        }))
    }

    fn on_record() -> Deployment {
        deployment(&Phase::Ended(crate::record::Ended {
            exit: Exit::Code(7),
            message: String::new(),
        }))
    }

    #[test]
    fn an_end_is_told_once_and_recorded_until_it_is_on_record() {
        let mut scene = Scene::new(vec![deployment(&Phase::Started)], vec![ready()]);
        assert!(scene.news(0).is_empty());
        scene.mirror.pod(Event::Apply(ended()));
        assert_eq!(scene.news(1), ["1 exited with code 7", "record the end of s"]);
        assert_eq!(scene.news(2), ["record the end of s"]);
        scene.mirror.deployment(Event::Apply(on_record()));
        assert!(scene.news(3).is_empty());
        scene.mirror.pod(Event::Delete(ended()));
        scene.mirror.deployment(Event::Delete(on_record()));
        assert!(scene.news(4).is_empty(), "its removal is no second end");
    }

    #[test]
    fn what_ended_before_the_first_look_is_told_by_lists_unless_it_was_begun_here() {
        let mut scene = Scene::new(vec![on_record()], vec![]);
        assert!(scene.news(0).is_empty());
        let mut scene = Scene::new(vec![on_record()], vec![]);
        assert_eq!(scene.news_where(0, true), ["1 exited with code 7"]);
        assert!(scene.news_where(1, true).is_empty());
    }

    #[test]
    fn who_deletes_a_deployment_by_hand_ends_the_session_and_who_stops_it_does_not() {
        let started = deployment(&Phase::Started);
        let mut scene = Scene::new(vec![started.clone()], vec![ready()]);
        scene.news(0);
        let mut going = started.clone();
        going.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        scene.mirror.deployment(Event::Apply(going));
        assert_eq!(scene.news(1), ["1 was removed by somebody else"]);
        scene.mirror.deployment(Event::Delete(started.clone()));
        assert!(scene.news(2).is_empty());

        let mut scene = Scene::new(vec![started.clone()], vec![ready()]);
        scene.news(0);
        scene
            .mirror
            .deployment(Event::Delete(deployment(&Phase::Stopping)));
        assert!(scene.news(1).is_empty());

        // Missed by a watch that was broken: found out by the list that it begins again with.
        let mut scene = Scene::new(vec![started], vec![ready()]);
        scene.news(0);
        scene.list(vec![], vec![]);
        assert_eq!(scene.news(1), ["1 was removed by somebody else"]);
    }

    #[test]
    fn trouble_is_told_when_it_lasts_once_a_kind_and_when_it_is_over() {
        let waiting = |reason: &str, message: &str| {
            pod(&json!({ "ready": false, "state": { "waiting": { "reason": reason, "message": message } } }))
        };
        let mut scene = Scene::new(vec![deployment(&Phase::Started)], vec![ready()]);
        scene.news(0);
        scene.mirror.pod(Event::Delete(ready()));
        assert!(scene.news(1).is_empty());
        scene.mirror.pod(Event::Apply(ready()));
        assert!(scene.news(2).is_empty(), "it was replaced at once");
        scene
            .mirror
            .pod(Event::Apply(waiting("ErrImagePull", "no route to host")));
        assert!(scene.news(3).is_empty() && scene.news(5).is_empty());
        assert_eq!(
            scene.news(6),
            ["the image \"i\" cannot be pulled: no route to host"]
        );
        scene
            .mirror
            .pod(Event::Apply(waiting("ImagePullBackOff", "back-off")));
        assert!(scene.news(20).is_empty(), "it is still the pull");
        scene.mirror.pod(Event::Apply(ready()));
        assert_eq!(scene.news(21), ["it is well again"]);
        assert!(scene.news(22).is_empty());
    }

    #[test]
    fn neither_hibernating_nor_starting_is_news() {
        let mut scene = Scene::new(vec![deployment(&Phase::Starting)], vec![]);
        for second in 0..10 {
            assert!(scene.news(second).is_empty());
        }
        scene
            .mirror
            .deployment(Event::Apply(deployment(&Phase::Hibernated)));
        for second in 10..20 {
            assert!(scene.news(second).is_empty());
        }
    }

    #[test]
    fn a_session_that_came_up_after_its_start_was_cut_off_is_put_on_record() {
        for phase in [Phase::Starting, Phase::Waking] {
            let mut scene = Scene::new(vec![deployment(&phase)], vec![ready()]);
            assert!(scene.news(0).is_empty() && scene.news(2).is_empty());
            assert_eq!(scene.news(3), ["record that s is up"]);
            scene.mirror.deployment(Event::Apply(deployment(&Phase::Started)));
            assert!(scene.news(4).is_empty());
        }
    }
}
