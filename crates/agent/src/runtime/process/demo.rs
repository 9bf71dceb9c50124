//! The program of the built-in template `demo`: a page that says which session it is.
//!
//! It is in the binary itself so that a first session needs nothing else. It serves on `PORT`, on `HOST` or else
//! on loopback, and ends by SIGTERM.

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Connections served at once; more are closed. A browser opens six.
const MAX_CONNECTIONS: usize = 32;

/// The longest request head that is read; browsers send about one kilobyte.
const MAX_HEAD: usize = 8 * 1024;

/// How long a client may take to send its request or to read the answer.
const CLIENT_PATIENCE: Duration = Duration::from_secs(5);

/// The stack of a connection's thread: small, as it may count against the session's memory.
const STACK: usize = 128 * 1024;

/// The main function of `regent internal demo`.
pub fn demo_main() -> ExitCode {
    match serve() {
        Ok(never) => match never {},
        Err(error) => {
            let _ = writeln!(io::stderr(), "demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<std::convert::Infallible> {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let port: u16 = variable("PORT")
        .parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "PORT is not set to a port"))?;
    let answer: Arc<str> = answer(&page(&[
        ("session", &variable("REGENT_SESSION")),
        ("user", &variable("REGENT_USER")),
        ("generation", &variable("REGENT_GENERATION")),
        ("agent", &variable("REGENT_AGENT")),
    ]))
    .into();
    let host = Some(variable("HOST")).filter(|host| !host.is_empty());
    let host = host.map_or(Ok(Ipv4Addr::LOCALHOST), |host| host.parse());
    let host =
        host.map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "HOST is not an IPv4 address"))?;
    let listener = TcpListener::bind((host, port))?;
    writeln!(io::stdout(), "demo: serving on http://{host}:{port}/")?;
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let (client, _) = listener.accept()?;
        if open.load(Ordering::Relaxed) >= MAX_CONNECTIONS {
            continue;
        }
        open.fetch_add(1, Ordering::Relaxed);
        let (answer, done) = (Arc::clone(&answer), Arc::clone(&open));
        let serve = move || {
            // A client that went away is nobody's fault.
            let _ = talk(client, &answer);
            done.fetch_sub(1, Ordering::Relaxed);
        };
        if std::thread::Builder::new()
            .stack_size(STACK)
            .spawn(serve)
            .is_err()
        {
            open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn talk(mut client: TcpStream, answer: &str) -> io::Result<()> {
    client.set_read_timeout(Some(CLIENT_PATIENCE))?;
    client.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut head = Vec::new();
    let mut chunk = [0; 1024];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let n = client.read(&mut chunk)?;
        if n == 0 || head.len() + n > MAX_HEAD {
            return Ok(());
        }
        head.extend_from_slice(&chunk[..n]);
    }
    client.write_all(answer.as_bytes())
}

fn answer(page: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {}\r\n\
         Cache-Control: no-store\r\nConnection: close\r\n\r\n{page}",
        page.len()
    )
}

fn page(rows: &[(&str, &str)]) -> String {
    let mut table = String::new();
    for (name, value) in rows {
        writeln!(table, "<tr><th>{name}</th><td>{}</td></tr>", escaped(value))
            .expect("writing to a string never fails");
    }
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Regent demo session</title>\
         <style>body{{font:1.1rem system-ui;margin:3rem}}th{{text-align:left;padding-right:2rem}}</style></head>\
         <body><h1>It runs</h1><table>\n{table}</table></body></html>\n"
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_shows_names_and_never_runs_them() {
        let page = page(&[("session", "a-demo-1"), ("user", "<script>")]);
        assert!(page.contains("a-demo-1") && page.contains("&lt;script&gt;") && !page.contains("<script>"));
        assert!(answer(&page).contains(&format!("Content-Length: {}\r\n", page.len())));
    }
}
