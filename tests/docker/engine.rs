//! A Docker engine of its own for tests, and the `docker` command for what a person would do by hand.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, OnceLock};

/// A Docker engine that ends with this process, however that ends: it watches the pipe.
pub struct Engine {
    pub host: String,
    folder: tempfile::TempDir,
    /// None once it is to end.
    control: Mutex<Option<(ChildStdin, BufReader<ChildStdout>)>>,
    script: Child,
}

impl Drop for Engine {
    /// What it made on the host goes only while its folder is there.
    fn drop(&mut self) {
        drop(self.control.lock().unwrap().take());
        let _ = self.script.wait();
    }
}

impl Engine {
    fn start() -> Result<Self, String> {
        let folder = tempfile::Builder::new()
            .prefix("regent-docker")
            .tempdir()
            .unwrap();
        let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
        let script = above.map(|folder| folder.join("tests/docker/engine"));
        let script = script.into_iter().find(|script| script.is_file()).unwrap();
        let mut child = Command::new(script)
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut host = String::new();
        output.read_line(&mut host).unwrap();
        if host.is_empty() {
            let mut why = String::new();
            let mut errors = BufReader::new(child.stderr.take().unwrap());
            std::io::Read::read_to_string(&mut errors, &mut why).unwrap();
            return Err(why.trim().to_owned());
        }
        Ok(Self {
            host: host.trim().to_owned(),
            folder,
            control: Mutex::new(Some((child.stdin.take().unwrap(), output))),
            script: child,
        })
    }

    /// The engine that all tests of this process share; none, and said so, where there can be none.
    pub fn shared(test: &str) -> Option<&'static Self> {
        static SHARED: OnceLock<Result<Engine, String>> = OnceLock::new();
        usable(test, SHARED.get_or_init(Self::start).as_ref())
    }

    /// An engine for one test that ends it.
    pub fn own(test: &str) -> Option<Self> {
        usable(test, Self::start())
    }

    /// Tells the script to do something to the engine, and waits until it is done.
    pub fn control(&self, line: &str) {
        let mut control = self.control.lock().unwrap();
        let control = control.as_mut().expect("it is there until it is dropped");
        writeln!(control.0, "{line}").unwrap();
        let mut answer = String::new();
        control.1.read_line(&mut answer).unwrap();
        assert!(
            !answer.is_empty(),
            "the engine is gone: see {}/log",
            self.folder.path().display()
        );
    }

    /// What a person would type.
    pub fn docker(&self, args: &[&str]) -> String {
        let output = self.docker_output(args);
        assert!(
            output.status.success(),
            "docker {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    pub fn docker_output(&self, args: &[&str]) -> std::process::Output {
        Command::new("/usr/bin/docker")
            .env("DOCKER_HOST", &self.host)
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

#[allow(clippy::print_stdout)] // it is for who runs the tests
fn usable<T, E: std::fmt::Display>(test: &str, engine: Result<T, E>) -> Option<T> {
    match engine {
        Ok(engine) => Some(engine),
        Err(why) => {
            let required = std::env::var("REGENT_REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|need| need == "docker"),
                "REGENT_REQUIRE demands docker, which is not here: {why}"
            );
            println!("SKIPPED: {test} lacks docker ({why})");
            None
        }
    }
}
