//! Clients that take too much: connections, requests, time, bytes.

use std::num::{NonZeroU32, NonZeroUsize};

use futures::future::join_all;
use reqwest::Method;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::support::{PATIENCE, TestNode};

const LIVEZ: &[u8] = b"GET /livez HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n";

#[tokio::test]
async fn one_address_has_so_many_connections_and_the_others_are_served() {
    let each = NonZeroUsize::new(3).unwrap();
    let node = TestNode::start_with(|options| options.limits.connections_per_address = each).await;
    let mut silent = Vec::new();
    for _ in 0..each.get() {
        silent.push(connect(&node, "127.0.0.2").await);
    }
    // Connections are taken up in the order in which they came.
    let mut refused = connect(&node, "127.0.0.2").await;
    let _ = refused.write_all(LIVEZ).await;
    assert_eq!(answer(&mut refused).await, "");
    node.get("/livez").await.is(200);

    silent.pop();
    let again = async {
        loop {
            let mut stream = connect(&node, "127.0.0.2").await;
            let _ = stream.write_all(LIVEZ).await;
            if answer(&mut stream).await.starts_with("HTTP/1.1 200") {
                break;
            }
        }
    };
    timeout(PATIENCE, again)
        .await
        .expect("a place that is free again");
}

#[tokio::test]
async fn a_token_that_asks_too_often_is_told_to_wait_and_an_admin_is_not() {
    let each = NonZeroU32::new(5).unwrap();
    let node = TestNode::start_with(|options| options.limits.requests_per_second = each).await;
    let token = node.user("eager", "user").await;
    let ask = |token: String| {
        let node = &node;
        async move {
            node.call(Method::GET, "/api/v1/sessions", &token, Value::Null)
                .await
        }
    };
    let replies = join_all((0..100).map(|_| ask(token.clone()))).await;
    let limited = replies.iter().find(|reply| reply.status == 429).unwrap();
    limited.is_problem(429, "busy");
    assert_eq!(limited.header("retry-after"), "1");
    assert!(
        limited.body["detail"]
            .as_str()
            .unwrap()
            .contains("more than 5 times a second")
    );
    assert!(replies.iter().any(|reply| reply.status == 200));
    for reply in join_all((0..100).map(|_| node.get("/api/v1/sessions"))).await {
        reply.is(200);
    }
    // And once it has waited it is served.
    let served = async { while ask(token.clone()).await.status != 200 {} };
    timeout(PATIENCE, served).await.expect("an answer after a while");
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused_while_it_comes() {
    let node = TestNode::start().await;
    let mut stream = connect(&node, "127.0.0.1").await;
    stream
        .write_all(b"GET /livez HTTP/1.1\r\nhost: node\r\nx: ")
        .await
        .unwrap();
    // For ever, unless the node says no.
    let (mut reading, mut writing) = stream.split();
    let flood = async { while writing.write_all(&[b'x'; 16 << 10]).await.is_ok() {} };
    let mut text = [0; 32];
    let refused = async {
        tokio::select! {
            () = flood => 0,
            read = reading.read(&mut text) => read.unwrap_or(0),
        }
    };
    let read = timeout(PATIENCE, refused).await.expect("a refusal");
    let text = String::from_utf8_lossy(&text[..read]);
    assert!(read == 0 || text.starts_with("HTTP/1.1 431"), "{text}");
    node.get("/livez").await.is(200);
}

/// Whoever begins a request and never ends it is let go, and nobody waits for that.
#[tokio::test]
async fn a_head_that_never_ends_is_given_up() {
    let node = TestNode::start().await;
    let mut slow = Vec::new();
    for _ in 0..50 {
        let mut stream = connect(&node, "127.0.0.1").await;
        stream.write_all(b"GET /livez HTTP/1.1\r\nhost: n").await.unwrap();
        slow.push(stream);
    }
    node.get("/livez").await.is(200);
    for stream in &mut slow {
        answer(stream).await;
    }
}

async fn connect(node: &TestNode, from: &str) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(format!("{from}:0").parse().unwrap()).unwrap();
    let to = node.url("").trim_start_matches("http://").parse().unwrap();
    socket.connect(to).await.unwrap()
}

/// All that comes until the node closes.
async fn answer(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    // A reset is an end too.
    let read = timeout(PATIENCE, stream.read_to_end(&mut text)).await;
    assert!(read.is_ok(), "the node keeps the connection");
    String::from_utf8_lossy(&text).into_owned()
}
