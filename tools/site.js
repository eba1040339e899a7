// What the pages do besides smalldocs: a search that ranks, a list of chapters that shows this one, and keys that reach whatever scrolls
(() => {
  // A section is found when it holds all words. Its title counts most, then the phrase, then how often the words occur;
  // a page that is about it helps, and so does an early chapter; exercises and reading lists come last. Fuse, which forgives typing errors, answers when nothing holds them all
  const Fuzzy = window.Fuse, low = (s) => s.toLowerCase();
  const count = (text, words) => Math.log2(text.split(words).length);
  const last = /^(try this|read on|further reading|hints?|solutions?)/i;
  const named = (title, phrase) => (title === phrase || title.endsWith("." + phrase) ? 100 : title.includes(phrase) ? 30 + 30 * phrase.length / title.length : 0);
  const chapters = [...document.querySelectorAll("#quarto-sidebar a")].map((a) => a.getAttribute("href").split("/").pop());
  const early = (e) => { const i = chapters.indexOf(e.href.split("#")[0].split("/").pop()); return i > 0 ? Math.max(0, 5 - .2 * i) : 0; };
  const score = (e, phrase, words, onPage) => {
    const title = low(e.title), section = low(e.section), text = low(e.text), all = `${title} ${section} ${text}`;
    if (!words.every((w) => all.includes(w))) return 0;
    const names = named(section, phrase) + named(title, phrase) * (section ? .2 : 1) + (words.every((w) => section.includes(w)) ? 20 : 0);
    const uses = 8 * count(text, phrase) + 2 * Math.min(...words.map((w) => count(text, w)));
    return (names + uses + 2 * Math.log2(1 + onPage[e.title]) + early(e)) * (last.test(section) ? .3 : 1);
  };
  window.Fuse = class {
    constructor(index, opts) { this.index = index; this.fuzzy = Fuzzy && new Fuzzy(index, opts); }
    search(query, opts) {
      const phrase = low(query.trim()), words = phrase.split(/\s+/);
      const onPage = {};
      this.index.forEach((e) => { onPage[e.title] = (onPage[e.title] || 0) + low(e.text).split(phrase).length - 1; });
      const hits = this.index.map((item) => ({ item, score: score(item, phrase, words, onPage) })).filter((h) => h.score > 0);
      if (!hits.length && this.fuzzy) return this.fuzzy.search(query, opts);
      return hits.sort((a, b) => b.score - a.score).slice(0, opts.limit);
    }
  };

  const side = document.querySelector("#quarto-sidebar"), here = side && side.querySelector("[aria-current]");
  if (here) side.scrollTop = here.offsetTop - side.clientHeight / 2;       // the chapter one reads is in view, however long the list

  const scrollers = () => document.querySelectorAll("main :is(pre, .sd-table, .cell-output-display, .math.display, .katex-display)");
  const reach = () => scrollers().forEach((e) => { if (e.scrollWidth > e.clientWidth) e.tabIndex = 0; else e.removeAttribute("tabindex"); });
  window.addEventListener("load", () => { reach(); document.fonts.ready.then(reach); });      // formulas are as wide as their letters
  window.addEventListener("resize", reach);
  document.addEventListener("toggle", reach, true);     // what was folded away had no width
})();
