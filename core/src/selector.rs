//! Label selectors, with the semantics of Kubernetes' `metav1.LabelSelector`.

use std::collections::{BTreeMap, BTreeSet};

/// An object's labels.
pub type Labels = BTreeMap<String, String>;

/// A conjunction of requirements. The empty selector matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct LabelSelector {
    /// All of these must hold.
    pub requirements: Vec<Requirement>,
}

/// One requirement on one label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Requirement {
    /// The label's key.
    pub key: String,
    /// What must hold of its value.
    pub operator: Operator,
}

/// What a [`Requirement`] asks of a label's value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operator {
    /// The label is present with one of these values.
    In(BTreeSet<String>),
    /// The label is absent, or has none of these values.
    NotIn(BTreeSet<String>),
    /// The label is present.
    Exists,
    /// The label is absent.
    DoesNotExist,
}

impl LabelSelector {
    /// A selector for objects that carry every one of `labels`.
    pub fn of_labels<K: Into<String>, V: Into<String>>(
        labels: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        let requirements = labels
            .into_iter()
            .map(|(key, value)| Requirement {
                key: key.into(),
                operator: Operator::In(BTreeSet::from([value.into()])),
            })
            .collect();
        Self { requirements }
    }

    /// Whether `labels` meet every requirement.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements
            .iter()
            .all(|requirement| requirement.matches(labels))
    }
}

impl Requirement {
    fn matches(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match &self.operator {
            Operator::In(values) => value.is_some_and(|value| values.contains(value)),
            Operator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_labels() -> Labels {
        BTreeMap::from([("tier".into(), "mail".into())])
    }

    fn mk_selector(key: &str, operator: Operator) -> LabelSelector {
        LabelSelector {
            requirements: vec![Requirement {
                key: key.into(),
                operator,
            }],
        }
    }

    #[test]
    fn empty_selector_matches_everything() {
        assert!(LabelSelector::default().matches(&Labels::new()));
    }

    #[test]
    fn operators_follow_kubernetes() {
        let mail = || BTreeSet::from(["mail".to_owned()]);
        for (key, operator, expected) in [
            ("tier", Operator::In(mail()), true),
            ("tier", Operator::NotIn(mail()), false),
            ("absent", Operator::In(mail()), false),
            ("absent", Operator::NotIn(mail()), true),
            ("tier", Operator::Exists, true),
            ("absent", Operator::Exists, false),
            ("tier", Operator::DoesNotExist, false),
            ("absent", Operator::DoesNotExist, true),
        ] {
            let selector = mk_selector(key, operator);
            assert_eq!(selector.matches(&mk_labels()), expected, "{selector:?}");
        }
    }

    #[test]
    fn of_labels_wants_all() {
        let selector = LabelSelector::of_labels([("tier", "mail"), ("zone", "a")]);
        assert!(!selector.matches(&mk_labels()));
    }
}
