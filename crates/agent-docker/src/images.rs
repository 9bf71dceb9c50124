//! Images: there, pulled with progress, deadline and repetition, or made of the agent's own program.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::io::{Read as _, Seek as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bollard::Docker;
use bollard::auth::DockerCredentials;
use bollard::errors::Error;
use bollard::query_parameters::{
    CreateImageOptionsBuilder, ListImagesOptionsBuilder, RemoveImageOptionsBuilder,
};
use futures::StreamExt as _;
use regent_client::backoff::FullJitter;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::io::ReaderStream;

use crate::error::{is_missing, status, words};
use crate::options::{DockerOptions, Pull};

/// The ceiling of the first wait before a pull is tried again.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// The ceiling of later waits.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// A file with credentials is not larger than this.
const MAX_CONFIG: u64 = 1024 * 1024;

/// Why there is no image.
#[derive(Debug)]
pub(crate) enum NoImage {
    /// It will not come by asking again.
    ForGood(String),
    /// It may come.
    ForNow(String),
}

/// Sees to it that the engine has the image, and tells how far a pull has come, in percent where that is known.
pub(crate) async fn ensure(
    docker: &Docker,
    options: &DockerOptions,
    image: &str,
    progress: impl Fn(String, Option<u32>),
) -> Result<(), NoImage> {
    let here = is_here(docker, image).await.map_err(|error| {
        let said = words(&error);
        if is_final(&error) {
            NoImage::ForGood(said)
        } else {
            NoImage::ForNow(said)
        }
    })?;
    match (options.pull, here) {
        (Pull::Missing | Pull::Never, true) => return Ok(()),
        (Pull::Never, false) => {
            return Err(NoImage::ForGood(format!(
                "the engine does not have the image {image}, and this agent pulls none (docker-pull)"
            )));
        }
        (Pull::Missing, false) | (Pull::Always, _) => {}
    }
    let credentials = match &options.registry_config {
        Some(file) => credentials(file, registry(image)).map_err(NoImage::ForNow)?,
        None => None,
    };
    progress(format!("pulling {image}"), None);
    let until = Instant::now() + options.pull_within;
    // A registry may be slow to begin; the deadline of the pull holds for the whole.
    let docker = docker
        .clone()
        .with_timeout(options.pull_within + crate::CALL_WITHIN);
    let mut wait = FullJitter::new(FIRST_WAIT, LONGEST_WAIT);
    loop {
        let error = match tokio::time::timeout_at(until, pull(&docker, image, credentials.clone(), &progress))
            .await
        {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(_) => {
                return still(
                    here,
                    image,
                    NoImage::ForNow(format!(
                        "the image {image} was not pulled within {} s",
                        options.pull_within.as_secs()
                    )),
                );
            }
        };
        let said = words(&error);
        tracing::warn!(image, error = said, "image was not pulled");
        if is_final(&error) {
            return still(
                here,
                image,
                NoImage::ForGood(format!("the image {image} cannot be pulled: {said}")),
            );
        }
        let pause = wait.next_delay();
        if Instant::now() + pause >= until {
            return still(
                here,
                image,
                NoImage::ForNow(format!("the image {image} cannot be pulled: {said}")),
            );
        }
        progress(format!("pulling {image} failed and is tried again: {said}"), None);
        tokio::time::sleep(pause).await;
    }
}

/// An older image that is here will do.
fn still(here: bool, image: &str, why: NoImage) -> Result<(), NoImage> {
    if here {
        tracing::warn!(
            image,
            "the image that is here is used, since a newer one cannot be pulled"
        );
        Ok(())
    } else {
        Err(why)
    }
}

async fn is_here(docker: &Docker, image: &str) -> Result<bool, Error> {
    match docker.inspect_image(image).await {
        Ok(_) => Ok(true),
        Err(error) if is_missing(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn pull(
    docker: &Docker,
    image: &str,
    credentials: Option<DockerCredentials>,
    progress: &impl Fn(String, Option<u32>),
) -> Result<(), Error> {
    let mut options = CreateImageOptionsBuilder::new().from_image(image);
    if !has_tag(image) {
        // Without one the engine would pull all that there are.
        options = options.tag("latest");
    }
    let mut lines = docker.create_image(Some(options.build()), None, credentials);
    let mut layers: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    let mut told = None;
    while let Some(line) = lines.next().await {
        let line = line?;
        let (Some(layer), Some(detail)) = (line.id, line.progress_detail) else {
            continue;
        };
        let (Some(current), Some(total)) = (detail.current, detail.total) else {
            continue;
        };
        if line.status.as_deref() == Some("Downloading") {
            let bytes = |n: i64| u64::try_from(n).unwrap_or_default();
            layers.insert(layer, (bytes(current), bytes(total)));
        }
        let (done, all) = layers
            .values()
            .fold((0, 0), |sum, layer| (sum.0 + layer.0, sum.1 + layer.1));
        let percent = (done * 100)
            .checked_div(all)
            .and_then(|percent| u32::try_from(percent).ok());
        // In steps of ten: it goes to people, through the control plane.
        if percent.map(|percent| percent / 10) != told {
            told = percent.map(|percent| percent / 10);
            progress(
                format!("pulling {image}: {} of {} MiB", done >> 20, all >> 20),
                percent,
            );
        }
    }
    Ok(())
}

/// Whether a registry would say the same again: there is no such image, or it is not for us.
fn is_final(error: &Error) -> bool {
    let said = words(error).to_ascii_lowercase();
    let refused = [
        "not found",
        "manifest unknown",
        "denied",
        "unauthorized",
        "no basic auth",
        "invalid reference",
    ];
    matches!(status(error), Some(400 | 401 | 403 | 404)) || refused.iter().any(|word| said.contains(word))
}

fn has_tag(image: &str) -> bool {
    image
        .rsplit('/')
        .next()
        .is_some_and(|last| last.contains([':', '@']))
}

/// The registry of an image, as `docker login` writes it down.
fn registry(image: &str) -> &str {
    match image.split_once('/') {
        Some((host, _)) if host != "docker.io" && (host.contains(['.', ':']) || host == "localhost") => host,
        _ => "https://index.docker.io/v1/",
    }
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    auths: BTreeMap<String, Auth>,
}

#[derive(Deserialize)]
struct Auth {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    identitytoken: Option<String>,
}

/// Reads what `docker login` has written. The error is for a person, and without a secret in it.
fn credentials(file: &Path, registry: &str) -> Result<Option<DockerCredentials>, String> {
    let about = |what: String| {
        format!(
            "the file {} with the credentials of registries {what}",
            file.display()
        )
    };
    let size = file
        .metadata()
        .map_err(|error| about(format!("cannot be read: {error}")))?
        .len();
    if size > MAX_CONFIG {
        return Err(about("is larger than any such file".to_owned()));
    }
    let text = std::fs::read_to_string(file).map_err(|error| about(format!("cannot be read: {error}")))?;
    let config: Config = serde_json::from_str(&text)
        .map_err(|error| about(format!("is not as docker login writes it: line {}", error.line())))?;
    let Some(auth) = config.auths.get(registry) else {
        return Ok(None);
    };
    let decoded = STANDARD
        .decode(auth.auth.trim())
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok());
    let Some((username, password)) = decoded.as_deref().and_then(|text| text.split_once(':')) else {
        return Err(about(format!("has no user and password for {registry}")));
    };
    Ok(Some(DockerCredentials {
        username: Some(username.to_owned()),
        password: Some(password.to_owned()),
        serveraddress: Some(registry.to_owned()),
        identitytoken: auth.identitytoken.clone(),
        ..DockerCredentials::default()
    }))
}

/// Where an image of this program has it.
pub(crate) const OWN_PROGRAM: &str = "/usr/local/bin/regent";

/// Makes an image of a program and the libraries that it has loaded, unless the engine has it already. For templates
/// whose command is `regent`, such as the demo, so that a first session needs no registry. `known` is what it was called
/// the last time, since reading the program takes long.
pub(crate) async fn ensure_own(
    docker: &Docker,
    program: &Path,
    known: &Mutex<Option<String>>,
) -> Result<String, String> {
    let failed =
        |error: &dyn std::fmt::Display| format!("no image can be made of the agent's own program: {error}");
    let engine = |error: Error| failed(&words(&error));
    let files = {
        let program = program.to_owned();
        move || files_of(&program)
    };
    let name = || async {
        let files = files.clone();
        let tag = tokio::task::spawn_blocking(move || tag_of(&files()?)).await;
        let tag = tag
            .map_err(|error| failed(&error))?
            .map_err(|error| failed(&error))?;
        Ok::<_, String>(format!("regent-own:{tag}"))
    };
    // One at a time: starts that came together would each make one.
    let mut known = known.lock().await;
    let image = match &*known {
        Some(image) => image.clone(),
        None => known.insert(name().await?).clone(),
    };
    if is_here(docker, &image).await.map_err(engine)? {
        return Ok(image);
    }
    let archive = tokio::task::spawn_blocking(move || archive(&files()?)).await;
    let archive = archive
        .map_err(|error| failed(&error))?
        .map_err(|error| failed(&error))?;
    let (repository, tag) = image.split_once(':').expect("it was just put together so");
    let options = CreateImageOptionsBuilder::new()
        .from_src("-")
        .repo(repository)
        .tag(tag)
        .changes(vec![
            "ENV PATH=/usr/local/bin".to_owned(),
            "ENV HOST=0.0.0.0".to_owned(),
            "USER 65534:65534".to_owned(),
        ])
        .build();
    let body = bollard::body_try_stream(ReaderStream::new(tokio::fs::File::from_std(archive)));
    let mut lines = docker.create_image(Some(options), Some(body), None);
    while let Some(line) = lines.next().await {
        line.map_err(engine)?;
    }
    remove_older(docker, repository, &image).await;
    Ok(image)
}

/// Those of programs that were replaced since, unless a session still has one.
async fn remove_older(docker: &Docker, repository: &str, image: &str) {
    let filters = HashMap::from([("reference".to_owned(), vec![repository.to_owned()])]);
    let options = ListImagesOptionsBuilder::new().filters(&filters).build();
    let listed = docker.list_images(Some(options)).await.unwrap_or_default();
    let older = listed
        .into_iter()
        .flat_map(|one| one.repo_tags)
        .filter(|tag| tag != image);
    for tag in older {
        let options = RemoveImageOptionsBuilder::new().force(false).build();
        if let Err(error) = docker.remove_image(&tag, Some(options), None).await {
            tracing::debug!(tag, error = words(&error), "an older image stays");
        }
    }
}

/// Where each file is, and where it goes.
type Files = Vec<(PathBuf, PathBuf)>;

/// The program and what it has loaded.
fn files_of(program: &Path) -> std::io::Result<Files> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let mut files: Files = libraries(&maps).map(|path| (path.clone(), path)).collect();
    files.push((program.to_owned(), PathBuf::from(OWN_PROGRAM)));
    Ok(files)
}

/// A tag that changes with the files.
fn tag_of(files: &Files) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    for (from, to) in files {
        hash.update(to.as_os_str().as_encoded_bytes());
        let mut file = std::fs::File::open(from)?;
        let mut chunk = vec![0; 1 << 20];
        loop {
            match file.read(&mut chunk)? {
                0 => break,
                read => hash.update(&chunk[..read]),
            }
        }
    }
    Ok(hash.finalize()[..8].iter().fold(String::new(), |mut tag, byte| {
        write!(tag, "{byte:02x}").expect("writing to a string never fails");
        tag
    }))
}

/// The files as a file system, in a temporary file that is gone with its handle.
fn archive(files: &Files) -> std::io::Result<std::fs::File> {
    let mut tar = tar::Builder::new(tempfile::tempfile()?);
    for (from, to) in files {
        let mut file = std::fs::File::open(from)?;
        let mut header = header(tar::EntryType::Regular, 0o755);
        header.set_size(file.metadata()?.len());
        tar.append_data(&mut header, to.strip_prefix("/").unwrap_or(to), &mut file)?;
    }
    // The interpreter is asked for under the name that the program has for it, usually below /lib64.
    for (link, target) in interpreter_links(files) {
        let mut header = header(tar::EntryType::Symlink, 0o777);
        tar.append_link(&mut header, link.strip_prefix("/").unwrap_or(&link), &target)?;
    }
    for folder in ["tmp", "config"] {
        tar.append_data(
            &mut header(tar::EntryType::Directory, 0o1777),
            folder,
            std::io::empty(),
        )?;
    }
    let mut file = tar.into_inner()?;
    file.rewind()?;
    Ok(file)
}

fn header(kind: tar::EntryType, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(0);
    header.set_mtime(0);
    header
}

/// The shared libraries among the mapped files. A static program has none.
fn libraries(maps: &str) -> impl Iterator<Item = PathBuf> {
    let paths: std::collections::BTreeSet<PathBuf> = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]))
        .filter(|path| path.rsplit('/').next().is_some_and(|name| name.contains(".so")))
        .map(PathBuf::from)
        .collect();
    paths.into_iter()
}

/// Links of the usual names of the interpreter to where it was mapped from.
fn interpreter_links(files: &[(PathBuf, PathBuf)]) -> Vec<(PathBuf, PathBuf)> {
    let usual = ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"];
    usual
        .into_iter()
        .map(PathBuf::from)
        .filter(|link| !files.iter().any(|(_, to)| to == link))
        .filter_map(|link| link.canonicalize().ok().map(|target| (link, target)))
        .filter(|(_, target)| {
            files
                .iter()
                .any(|(from, _)| from.canonicalize().ok().as_ref() == Some(target))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registry_of_an_image_is_its_host_or_docker_hub() {
        assert_eq!(registry("nginx"), "https://index.docker.io/v1/");
        assert_eq!(registry("library/nginx:1"), "https://index.docker.io/v1/");
        assert_eq!(registry("registry.example.org/a/b:1"), "registry.example.org");
        assert_eq!(registry("docker.io/library/nginx"), "https://index.docker.io/v1/");
        assert_eq!(registry("localhost/a"), "localhost");
        assert_eq!(registry("127.0.0.1:5000/a"), "127.0.0.1:5000");
        assert!(has_tag("a/b:1") && has_tag("a@sha256:00") && !has_tag("host:5000/a"));
    }

    #[test]
    fn credentials_are_those_of_the_registry_and_an_error_shows_no_secret() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.json");
        let auth = STANDARD.encode("user:pass:word");
        std::fs::write(
            &file,
            format!(
                r#"{{"auths":{{"r.example.org":{{"auth":"{auth}"}},"bad":{{"auth":"{}"}}}}}}"#,
                STANDARD.encode("secret")
            ),
        )
        .unwrap();
        let found = credentials(&file, "r.example.org").unwrap().unwrap();
        assert_eq!(
            (found.username.as_deref(), found.password.as_deref()),
            (Some("user"), Some("pass:word"))
        );
        assert!(credentials(&file, "other").unwrap().is_none());
        let error = credentials(&file, "bad").unwrap_err();
        assert!(
            error.contains("no user and password for bad") && !error.contains("secret"),
            "{error}"
        );
        std::fs::write(&file, "{").unwrap();
        assert!(credentials(&file, "bad").unwrap_err().contains("docker login"));
        assert!(
            credentials(&folder.path().join("none"), "bad")
                .unwrap_err()
                .contains("cannot be read")
        );
    }

    #[test]
    fn libraries_are_read_off_the_memory_map() {
        let maps = "5500-5600 r-xp 00 fe:00 1 /usr/bin/regent\n7f00-7f01 r-xp 00 fe:00 2 /usr/lib/libc.so.6\n\
                    7f01-7f02 r--p 00 fe:00 2 /usr/lib/libc.so.6\n7ff0-7ff1 rw-p 00 00:00 0 [stack]\n";
        assert_eq!(
            libraries(maps).collect::<Vec<_>>(),
            [PathBuf::from("/usr/lib/libc.so.6")]
        );
    }
}
