//! The templates that come with Regent, as the first operation writes them.
//!
//! They are constants of feature level 1: every node must write the same bytes. They need nothing
//! but the `regent` program itself and a shell, so that a first session runs on any machine.

use regent_types::TemplateName;

/// A template that comes with Regent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BuiltIn {
    name: &'static str,
    /// JSON text.
    pub(crate) manifest: &'static str,
    /// In thousandths.
    pub(crate) cpu: u64,
    /// In bytes.
    pub(crate) memory: u64,
}

impl BuiltIn {
    pub(crate) fn name(&self) -> TemplateName {
        TemplateName::new(self.name)
            .expect("the names of built-in templates are valid: a test reads them all")
    }
}

/// All of them.
pub(crate) const TEMPLATES: [BuiltIn; 3] = [
    BuiltIn {
        name: "demo",
        manifest: r#"{"apiVersion":"stream.space/v1alpha1","kind":"Template","metadata":{"name":"demo"},"spec":{"displayName":"Demo","description":"A small web page, served by the regent program itself on a free port.","category":"Examples","command":["regent","internal","demo"],"ports":[{"name":"http","containerPort":8080,"protocol":"TCP"}],"defaultResources":{"memory":"64Mi","cpu":"100m"},"hibernate":"pause"}}"#,
        cpu: 100,
        memory: 64 << 20,
    },
    BuiltIn {
        name: "sleep",
        manifest: r#"{"apiVersion":"stream.space/v1alpha1","kind":"Template","metadata":{"name":"sleep"},"spec":{"displayName":"Sleep","description":"Does nothing until it is stopped.","category":"Examples","command":["sleep"],"args":["infinity"],"defaultResources":{"memory":"16Mi","cpu":"10m"},"hibernate":"pause"}}"#,
        cpu: 10,
        memory: 16 << 20,
    },
    BuiltIn {
        name: "shell-loop",
        manifest: r#"{"apiVersion":"stream.space/v1alpha1","kind":"Template","metadata":{"name":"shell-loop"},"spec":{"displayName":"Shell loop","description":"Writes a line to its log every second.","category":"Examples","command":["sh","-c"],"args":["n=0; while true; do n=$((n+1)); echo \"line $n\"; sleep 1; done"],"defaultResources":{"memory":"16Mi","cpu":"10m"},"hibernate":"pause"}}"#,
        cpu: 10,
        memory: 16 << 20,
    },
];

#[cfg(test)]
mod tests {
    use regent_types::template::Manifest;

    use super::*;

    #[test]
    fn every_built_in_template_is_a_manifest_of_its_own_name_and_size() {
        for built_in in TEMPLATES {
            let manifest: Manifest = serde_json::from_str(built_in.manifest).unwrap();
            assert_eq!(manifest.metadata.name, built_in.name());
            assert_eq!(manifest.spec.default_resources.cpu.unwrap().0, built_in.cpu);
            assert_eq!(manifest.spec.default_resources.memory.unwrap().0, built_in.memory);
            assert!(!manifest.spec.command.is_empty());
        }
    }
}
