//! The stream of events: in the order of the log, resumed on any node without a gap or a duplicate, and an
//! honest end when it cannot be.

use std::collections::BTreeSet;

use futures::StreamExt as _;
use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::{Dev, PATIENCE};
use crate::wire::Api;

/// An open stream, read as a browser would.
struct Events {
    bytes: futures::stream::BoxStream<'static, reqwest::Result<Vec<u8>>>,
    text: String,
}

impl Events {
    async fn open(api: &Api, query: &str, last: Option<&str>) -> Self {
        let mut request = api.request(Method::GET, &format!("events{query}"));
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let bytes = response.bytes_stream().map(|piece| piece.map(Vec::from)).boxed();
        Self {
            bytes,
            text: String::new(),
        }
    }

    /// The next event: its id and data.
    async fn next(&mut self) -> (String, Value) {
        tokio::time::timeout(PATIENCE, async {
            loop {
                while let Some((block, rest)) = self.text.split_once("\n\n") {
                    let field = |name: &str| {
                        block
                            .lines()
                            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
                    };
                    let found = field("data").map(|data| {
                        (
                            field("id").unwrap().to_owned(),
                            serde_json::from_str(data).unwrap(),
                        )
                    });
                    let rest = rest.to_owned();
                    self.text = rest;
                    if let Some(found) = found {
                        return found;
                    }
                }
                let piece = self.bytes.next().await.expect("the stream ended").unwrap();
                self.text.push_str(&String::from_utf8(piece).unwrap());
            }
        })
        .await
        .expect("no event came")
    }

    /// All up to the one about a subject, with their ids.
    async fn until(&mut self, subject: &str) -> Vec<(String, Value)> {
        let mut all = Vec::new();
        loop {
            let event = self.next().await;
            let last = event.1["subject"] == subject;
            all.push(event);
            if last {
                return all;
            }
        }
    }
}

async fn template(api: &Api, name: &str) {
    let manifest = json!({ "metadata": { "name": name }, "spec": { "command": ["true"] } });
    api.post("templates", manifest).await.ok(201);
}

fn place(id: &str) -> (u64, u64) {
    let (revision, n) = id.split_once('.').unwrap();
    (revision.parse().unwrap(), n.parse().unwrap())
}

#[tokio::test]
async fn all_nodes_tell_the_same_events_in_the_same_order() {
    let dev = Dev::start();
    let mut streams = Vec::new();
    for node in 0..3 {
        streams.push(Events::open(&dev.api(node), "?kinds=session,template", None).await);
    }
    let session = dev
        .api(1)
        .post("sessions", json!({ "template": "sleep" }))
        .await
        .ok(202);
    let name = session["name"].as_str().unwrap().to_owned();
    crate::harness::session_state(
        &dev.client(),
        &regent_types::SessionName::new(&name).unwrap(),
        regent_types::session::SessionState::Running,
    )
    .await;
    for n in 0..20 {
        template(&dev.api(n % 3), &format!("t{n}")).await;
    }
    let mut told = Vec::new();
    for stream in &mut streams {
        told.push(stream.until("t19").await);
    }
    assert_eq!(told[0], told[1]);
    assert_eq!(told[0], told[2]);
    let ids: Vec<_> = told[0].iter().map(|(id, _)| place(id)).collect();
    assert!(
        ids.is_sorted() && ids.iter().collect::<BTreeSet<_>>().len() == ids.len(),
        "{ids:?}"
    );
    for (id, event) in &told[0] {
        assert_eq!(event["id"], id.as_str());
        assert_eq!(event["revision"], place(id).0);
        assert!(
            event["time"].as_str().unwrap().ends_with('Z') && event["record"].is_object(),
            "{event}"
        );
    }
    let life: Vec<&str> = told[0]
        .iter()
        .filter(|(_, e)| e["subject"] == name.as_str())
        .map(|(_, e)| e["kind"].as_str().unwrap())
        .collect();
    assert_eq!(life.first(), Some(&"session.created"));
    assert_eq!(
        life.iter().filter(|kind| **kind == "session.running").count(),
        1,
        "{life:?}"
    );
}

#[tokio::test]
async fn a_watcher_resumes_on_another_node_without_a_gap_or_a_duplicate() {
    let dev = Dev::start();
    let mut whole = Events::open(&dev.api(0), "?kinds=template", None).await;
    let mut broken = Events::open(&dev.api(0), "?kinds=template", None).await;
    let mut seen = Vec::new();
    for round in 0..6 {
        for n in 0..5 {
            template(&dev.api(n % 3), &format!("r{round}-{n}")).await;
        }
        // It breaks off in the middle of what there is, and goes on at the next node with its last id.
        for _ in 0..3 {
            seen.push(broken.next().await);
        }
        let last = seen.last().unwrap().0.clone();
        let next = dev.api((round + 1) % 3);
        broken = if round % 2 == 0 {
            Events::open(&next, "?kinds=template", Some(&last)).await
        } else {
            Events::open(&next, &format!("?kinds=template&after={last}"), None).await
        };
    }
    seen.extend(broken.until("r5-4").await);
    assert_eq!(seen, whole.until("r5-4").await);
    assert_eq!(seen.len(), 30);
}

#[tokio::test]
async fn a_watcher_goes_on_when_its_node_dies() {
    let mut dev = Dev::start();
    let mut stream = Events::open(&dev.api(2), "?kinds=template", None).await;
    template(&dev.api(0), "before").await;
    let last = stream.until("before").await.pop().unwrap().0;
    dev.kill_node(2);
    let written = crate::harness::eventually("a write without the node", || async {
        let manifest = json!({ "metadata": { "name": "after" }, "spec": { "command": ["true"] } });
        let answer = dev.api(0).post_once("templates", "after", manifest).await;
        (answer.status == 201).then_some(())
    });
    written.await;
    let mut stream = Events::open(&dev.api(1), "?kinds=template", Some(&last)).await;
    assert_eq!(stream.next().await.1["subject"], "after");
}

#[tokio::test]
async fn an_id_that_cannot_be_resumed_from_is_410_and_a_bad_one_400() {
    let dev = Dev::start();
    let api = dev.api(0);
    // Of another cluster: this one has not come that far.
    for node in 0..3 {
        dev.api(node)
            .get("events?after=99999999.0")
            .await
            .problem(410, "gone");
    }
    for (query, field) in [
        ("after=x", "after"),
        ("after=1", "after"),
        ("kinds=sessions", "kinds"),
        ("kind=session", "kind"),
    ] {
        let answer = api.get(&format!("events?{query}")).await;
        assert!(
            answer.fields()[0].contains(field) || answer.text.contains(field),
            "{}",
            answer.text
        );
        answer.problem(400, "invalid_request");
    }
    let bad = api
        .request(Method::GET, "events")
        .header("last-event-id", "nonsense");
    assert_eq!(api.send(bad).await.fields(), ["Last-Event-ID"]);
}

#[tokio::test]
async fn a_watcher_sees_what_it_may_and_its_stream_ends_with_its_token() {
    let dev = Dev::start();
    let admin = dev.api(0);
    let (anna, bert) = (admin.user("anna", "user").await, admin.user("bert", "user").await);
    let mut all = Events::open(&admin, "?kinds=session", None).await;
    let mut berts = Events::open(&bert, "?kinds=session", None).await;
    let hers = anna
        .post("sessions", json!({ "template": "sleep" }))
        .await
        .ok(202);
    let his = bert
        .post("sessions", json!({ "template": "sleep" }))
        .await
        .ok(202);
    let his = his["name"].as_str().unwrap();
    let first = berts.next().await.1;
    assert_eq!(
        (&first["subject"], &first["kind"]),
        (&json!(his), &json!("session.created")),
        "hers is not for him"
    );
    let told = all.until(his).await;
    assert!(told.iter().any(|(_, event)| event["subject"] == hers["name"]));
    for token in admin.get("tokens?user=bert").await.ok(200)["tokens"]
        .as_array()
        .unwrap()
    {
        admin
            .delete(&format!("tokens/{}", token["id"].as_str().unwrap()))
            .await;
    }
    let ended = async { while let Some(Ok(_)) = berts.bytes.next().await {} };
    tokio::time::timeout(PATIENCE, ended)
        .await
        .expect("the stream of a revoked token goes on");
}
