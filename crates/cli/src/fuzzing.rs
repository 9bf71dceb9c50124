//! Configuration and the line protocol of `lease hold` behind functions that take bytes, for the fuzz targets and the
//! property tests (`tests/decoders`). Not a part of what this crate offers.

use figment::providers::{Format as _, Serialized, Toml};

use crate::agent_config::AgentConfig;
use crate::config::{ServerConfig, Settings, combine};
use crate::hold::fuzzing::line;

/// Settings. The first byte says of which command; up to a line `--` the text is the file, then come variables, one a
/// line.
pub fn settings(bytes: &[u8]) {
    let Some((kind, text)) = bytes.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(text);
    let (file, variables) = text.split_once("\n--\n").unwrap_or((&text, ""));
    if kind % 2 == 0 {
        read::<ServerConfig>(file, variables);
    } else {
        read::<AgentConfig>(file, variables);
    }
}

/// A line of `lease hold` or its watchdog.
pub fn hold_line(bytes: &[u8]) {
    line(&String::from_utf8_lossy(bytes));
}

fn read<S: Settings + Default>(file: &str, variables: &str) {
    let variables: Vec<_> = variables
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_ascii_lowercase(), Ok(value.to_owned())))
        .collect();
    let read = combine(Some(Toml::string(file)), variables.iter().cloned(), S::default());
    for (name, text) in &variables {
        let setting = name.replace('_', "-");
        let last = variables
            .iter()
            .rev()
            .find(|(other, _)| other.replace('_', "-") == setting);
        let (Ok(text), true) = (text, last.is_some_and(|last| last.1 == *text)) else {
            continue;
        };
        if let ("region" | "platform" | "advertise-http", Ok(settings)) = (setting.as_str(), &read)
            && S::KEYS.contains(&setting.as_str())
        {
            let settings = serde_json::to_value(settings).expect("settings are JSON");
            assert_eq!(
                settings[&setting], **text,
                "a variable was taken for something else"
            );
        }
    }
    match read {
        Ok(settings) => {
            let again: S = combine(
                Some(Serialized::defaults(&settings)),
                std::iter::empty(),
                S::default(),
            )
            .expect("what was read can be read");
            assert_eq!(
                serde_json::to_value(settings).ok(),
                serde_json::to_value(again).ok(),
                "settings changed on their way"
            );
        }
        Err(error) => assert!(!error.to_string().is_empty(), "an error says nothing"),
    }
}

/// Settings to begin with.
#[must_use]
pub fn settings_samples() -> Vec<Vec<u8>> {
    let server = "node-id = 1\ndata = \"/d\"\nhttp = \"127.0.0.1:1\"\npeer = \"[::1]:2\"\nadvertise-http = \"a:1\"\n\
        log-store = \"segments\"\nheartbeat = \"5s\"\nstale-after = \"30s\"\ncluster-secret-file = \"/s\"\n\
        [members]\n1 = \"a:1\"\n2 = \"b:2\"\n--\nADVERTISE_HTTP=b:1\nNODE_ID=2\nMEMBERS=1=a:1,2=b:2\n";
    let agent = "agent-id = \"a\"\nservers = \"http://a,http://b\"\nruntime = \"docker\"\nreplica = \"r1\"\n\
        lease-ttl = \"4s\"\nlabels = [\"a=b\"]\nmax-sessions = 5\ncpu = \"64 cores\"\nmemory = \"128GB\"\n\
        parallel = 3\ndocker-publish = \"127.0.0.1\"\ndocker-pull = \"missing\"\n\
        kubernetes-pod-security = \"baseline\"\nkubernetes-run-as-user = 1000\n--\nREGION=7\nLABELS=[\"c=d\"]\n\
        AGENT_ID=12\nMAX_SESSIONS=9\nPLATFORM=true\n";
    vec![
        [b"\0", server.as_bytes()].concat(),
        [b"\x01", agent.as_bytes()].concat(),
    ]
}
