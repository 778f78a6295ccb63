// Telling a node what to do, for who opened the page with the address that `--operate` printed.

import { $, make, say } from "./dom.js";

const KEPT = "deca-operator";
const VERBS = [["pause", "Pause"], ["resume", "Resume"], ["checkpoint", "Save now"], ["export", "Export"], ["stop", "Stop…"]];

// The token is behind the #, which no browser sends, and leaves the address line at once.
function token() {
  const given = new URLSearchParams(location.hash.slice(1)).get("operate");
  if (given) {
    sessionStorage.setItem(KEPT, given);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem(KEPT);
}

export class Operate {
  constructor(box) {
    this.box = box;
    this.token = token();
    // Another address of this page, typed into its tab, does not load it again.
    addEventListener("hashchange", () => { this.token = token(); });
    this.key = null;
    this.note = make("p", { class: "note", role: "status" });
    this.verbs = make("div", { class: "buttons" }, ...VERBS.map(([verb, text]) =>
      make("button", { "data-verb": verb, text, onclick: () => (verb === "stop" ? this.ask() : this.tell(verb)) })));
    this.sure = make("button", { class: "danger", onclick: () => this.tell("stop") });
    this.question = make("div", { class: "buttons", hidden: true }, this.sure,
      make("button", { text: "Cancel", onclick: () => this.verbs.querySelector("[data-verb=stop]").focus(this.calm()) }));
    box.append(this.verbs, this.question, this.note);
  }

  // Of the node whose details are shown.
  show(node) {
    this.box.hidden = !this.token || node.state !== "live";
    if (node.key === this.key) return;
    this.key = node.key;
    this.name = node.node;
    say(this.note, "");
    this.calm();
  }

  ask() {
    say(this.sure, `Stop ${this.name}, its state saved`);
    this.verbs.hidden = true;
    this.question.hidden = false;
    this.sure.focus();
  }

  calm() {
    this.verbs.hidden = false;
    this.question.hidden = true;
  }

  async tell(verb) {
    const key = this.key;
    this.calm();
    say(this.note, `${verb}…`);
    let text;
    try {
      const answer = await fetch("/api/operate", {
        method: "POST",
        headers: { "content-type": "application/json", "x-deca-operator": this.token },
        body: JSON.stringify({ key, verb }),
      });
      const told = answer.status === 404 || answer.status === 405 ? { error: "this dashboard was started without --operate" } : await answer.json();
      text = told.said ?? told.error;
      if (answer.status === 403) sessionStorage.removeItem(KEPT);
    } catch {
      text = "the dashboard does not answer";
    }
    if (key === this.key) say(this.note, `${verb}: ${text}`);
  }
}
