//! Templates.

use regent_types::TemplateName;
use regent_types::template::{Manifest, Template, TemplateList};

use crate::call::Call;
use crate::page::{Page, fetch_all};
use crate::{Client, Error};

impl Client {
    /// Makes a template; refused if one of that name exists.
    pub async fn create_template(&self, manifest: &Manifest) -> Result<Template, Error> {
        self.fetch(Call::post(["templates"]).body(manifest)).await
    }

    /// Makes or replaces a template.
    pub async fn apply_template(&self, manifest: &Manifest) -> Result<Template, Error> {
        let name = manifest.metadata.name.as_str();
        self.fetch(Call::put(["templates", name]).body(manifest)).await
    }

    /// One page of the templates.
    pub async fn templates(&self, page: &Page) -> Result<TemplateList, Error> {
        self.fetch(Call::get(["templates"]).query(page.query())).await
    }

    /// All templates.
    pub async fn all_templates(&self) -> Result<Vec<Template>, Error> {
        fetch_all(|page| async move {
            let list = self.templates(&page).await?;
            Ok((list.templates, list.next_cursor))
        })
        .await
    }

    /// One template.
    pub async fn template(&self, name: &TemplateName) -> Result<Template, Error> {
        self.fetch(Call::get(["templates", name.as_str()])).await
    }

    /// Removes a template. Sessions that were made from it go on.
    pub async fn delete_template(&self, name: &TemplateName) -> Result<(), Error> {
        self.send(Call::delete(["templates", name.as_str()]))
            .await
            .map(drop)
    }
}
