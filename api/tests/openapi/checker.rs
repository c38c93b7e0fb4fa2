//! As much of JSON Schema as `docs/openapi.json` uses, and stricter in one thing: an object may have described members
//! only. A keyword that is not known here is a fault: nothing passes because nobody looked at it.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

/// The document.
pub(crate) struct Document(Value);

/// Names of members.
pub(crate) type Names = BTreeSet<String>;

impl Document {
    pub(crate) fn read() -> Self {
        let text = include_str!("../../../docs/openapi.json");
        Self(serde_json::from_str(text).expect("docs/openapi.json is JSON"))
    }

    pub(crate) fn root(&self) -> &Value {
        &self.0
    }

    /// What a reference such as `#/components/schemas/Name` leads to.
    pub(crate) fn find(&self, reference: &str) -> Option<&Value> {
        self.0.pointer(reference.strip_prefix('#')?)
    }

    pub(crate) fn schemas(&self) -> &Map<String, Value> {
        object(&self.0["components"]["schemas"])
    }

    pub(crate) fn schema(&self, name: &str) -> &Value {
        let schema = self.schemas().get(name);
        schema.unwrap_or_else(|| panic!("docs/openapi.json: components.schemas has no {name}"))
    }

    /// The value itself, or what it refers to.
    pub(crate) fn resolved<'d>(&'d self, value: &'d Value) -> &'d Value {
        match value["$ref"].as_str() {
            Some(reference) => self.find(reference).unwrap_or_else(|| panic!("{reference}")),
            None => value,
        }
    }

    /// Everything that has to hold at once: the schema, what it refers to, and what it is made of.
    fn parts<'d>(&'d self, schema: &'d Value) -> Vec<&'d Map<String, Value>> {
        let own = object(schema);
        let mut parts = vec![own];
        if let Some(reference) = own.get("$ref").and_then(Value::as_str) {
            let found = self.find(reference).unwrap_or_else(|| panic!("{reference}"));
            parts.extend(self.parts(found));
        }
        for part in own.get("allOf").map(array).unwrap_or_default() {
            parts.extend(self.parts(part));
        }
        parts
    }

    /// The members that an object may have, and those that it must have.
    pub(crate) fn members(&self, schema: &Value) -> (Names, Names) {
        let (mut may, mut must) = (Names::new(), Names::new());
        for part in self.parts(schema) {
            may.extend(properties(part).map(|(name, _)| name.clone()));
            must.extend(part.get("required").map(words).unwrap_or_default());
        }
        (may, must)
    }

    /// What is wrong with a value, each with its place.
    pub(crate) fn faults(&self, schema: &Value, value: &Value) -> Vec<String> {
        let mut faults = Vec::new();
        self.check(schema, value, "$", &mut faults);
        faults
    }

    fn check(&self, schema: &Value, value: &Value, at: &str, faults: &mut Vec<String>) {
        let parts = self.parts(schema);
        for part in &parts {
            self.check_part(part, value, at, faults);
        }
        let describes = |part: &&Map<String, Value>| {
            part.contains_key("properties") || part.contains_key("additionalProperties")
        };
        let open = parts.iter().any(|part| part.contains_key("additionalProperties"));
        if !open && parts.iter().any(describes) {
            let (may, _) = self.members(schema);
            for name in value.as_object().into_iter().flat_map(Map::keys) {
                if !may.contains(name) {
                    faults.push(format!("{at}.{name} is not described"));
                }
            }
        }
    }

    fn check_part(&self, part: &Map<String, Value>, value: &Value, at: &str, faults: &mut Vec<String>) {
        let empty = Map::new();
        let members = value.as_object().unwrap_or(&empty);
        for (keyword, rule) in part {
            let holds = match keyword.as_str() {
                // Taken apart before, or for people, or not looked at.
                "$ref" | "allOf" | "description" | "default" | "examples" => true,
                "format" | "pattern" | "contentEncoding" => value.is_string() || value.is_null(),
                "type" => match rule {
                    Value::Array(kinds) => kinds.iter().any(|kind| is(kind, value)),
                    kind => is(kind, value),
                },
                "enum" => array(rule).contains(value),
                "const" => rule == value,
                "required" => words(rule).iter().all(|name| members.contains_key(name)),
                "properties" => {
                    for (name, schema) in object(rule) {
                        if let Some(member) = members.get(name) {
                            self.check(schema, member, &format!("{at}.{name}"), faults);
                        }
                    }
                    true
                }
                "additionalProperties" => {
                    let own: Names = properties(part).map(|(name, _)| name.clone()).collect();
                    let others = members.iter().filter(|(name, _)| !own.contains(*name));
                    for (name, member) in others {
                        match rule {
                            Value::Bool(false) => faults.push(format!("{at}.{name} is not described")),
                            schema => self.check(schema, member, &format!("{at}.{name}"), faults),
                        }
                    }
                    true
                }
                "propertyNames" => members
                    .keys()
                    .all(|name| self.faults(rule, &Value::from(name.as_str())).is_empty()),
                "items" => {
                    for (place, item) in value.as_array().into_iter().flatten().enumerate() {
                        self.check(rule, item, &format!("{at}[{place}]"), faults);
                    }
                    true
                }
                "oneOf" => {
                    let fits = |schema: &&Value| self.faults(schema, value).is_empty();
                    array(rule).iter().filter(fits).count() == 1
                }
                "not" => !self.faults(rule, value).is_empty(),
                "minItems" => length(value) >= number(rule),
                "maxItems" => length(value) <= number(rule),
                "minLength" => characters(value) >= number(rule),
                "maxLength" => characters(value) <= number(rule),
                "minProperties" => members.len() as u64 >= number(rule),
                "maxProperties" => members.len() as u64 <= number(rule),
                "minimum" => value.as_u64().is_none_or(|value| value >= number(rule)) && !negative(value),
                "maximum" => value.as_u64().is_none_or(|value| value <= number(rule)),
                other => panic!("docs/openapi.json uses {other}, which this checker does not know"),
            };
            if !holds {
                faults.push(format!("{at}: {value} does not hold to {keyword} {rule}"));
            }
        }
    }
}

pub(crate) fn object(value: &Value) -> &Map<String, Value> {
    value.as_object().unwrap_or_else(|| panic!("no object: {value}"))
}

pub(crate) fn array(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("no array: {value}"))
}

/// The texts of an array.
pub(crate) fn words(value: &Value) -> Vec<String> {
    let text = |word: &Value| word.as_str().expect("a text").to_owned();
    array(value).iter().map(text).collect()
}

fn properties(part: &Map<String, Value>) -> impl Iterator<Item = (&String, &Value)> {
    part.get("properties").into_iter().flat_map(object)
}

fn is(kind: &Value, value: &Value) -> bool {
    match kind.as_str() {
        Some("string") => value.is_string(),
        Some("integer") => value.is_u64() || value.is_i64(),
        Some("boolean") => value.is_boolean(),
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("null") => value.is_null(),
        _ => panic!("{kind} is no type that this checker knows"),
    }
}

fn length(value: &Value) -> u64 {
    value.as_array().map_or(0, Vec::len) as u64
}

fn characters(value: &Value) -> u64 {
    value.as_str().map_or(0, |text| text.chars().count()) as u64
}

/// No limit of the document is below zero.
fn number(rule: &Value) -> u64 {
    rule.as_u64().unwrap_or_else(|| panic!("no number: {rule}"))
}

fn negative(value: &Value) -> bool {
    value.as_i64().is_some_and(|value| value < 0)
}
