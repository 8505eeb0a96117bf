//! What the API server checks of label selectors.

/// A rule on a list of selectors: none of them is empty. An empty one matches everything, which is rarely meant
/// where it stands and always said by leaving the list out.
pub(crate) const NOT_EMPTY: &str = "self.all(s, (has(s.matchLabels) && s.matchLabels.size() > 0) || (has(s.matchExpressions) && s.matchExpressions.size() > 0))";

/// The same of one selector.
pub(crate) const NOT_EMPTY_ONE: &str = "(has(self.matchLabels) && self.matchLabels.size() > 0) || (has(self.matchExpressions) && self.matchExpressions.size() > 0)";

/// A rule on one selector: its expressions can be read. The schema of `LabelSelector` lets any operator through.
pub(crate) const READABLE_ONE: &str = "!has(self.matchExpressions) || self.matchExpressions.all(e, e.operator in ['In', 'NotIn'] ? (has(e.values) && e.values.size() > 0) : (e.operator in ['Exists', 'DoesNotExist'] && (!has(e.values) || e.values.size() == 0)))";
