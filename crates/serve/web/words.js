// The page's words in both languages, and the sentence about the model's size.

const WORDS = {
  en: {
    unofficial: 'AI, unofficial',
    retry: 'Retry now',
    ok: 'ready',
    busy: (queue) => `busy: ${queue.running} speaking, ${queue.waiting} waiting`,
    loading: 'the model is loading',
    stopped: 'the engine has stopped; restart the server',
    unreachable: (seconds) => `server not reachable, next try in ${seconds} s`,
    connecting: 'connecting',
    movie: 'Movie mode',
    movieHint: 'One line at a time',
    log: 'Conversation',
    stage: 'Movie mode',
    next: 'Next line',
    auto: 'Auto (A)',
    backlog: 'Log (L)',
    hide: 'Hide (H)',
    leave: 'Leave (Esc)',
    tools: 'Conversation tools',
    swipe: 'Another reply',
    swipeHint: 'Ask for another reply to the same message',
    previous: 'Earlier reply',
    following: 'Later reply',
    undo: 'Undo',
    undoHint: 'Take back the last message and its reply',
    edit: 'Edit',
    editHint: 'Change the last message and send it again',
    editing: 'Editing the last message: Enter sends it anew, Esc leaves it as it was.',
    copy: 'Copy',
    copyHint: 'Copy the last reply',
    copied: 'Copied.',
    export: 'Export',
    exportHint: 'Save the conversation as a JSON file',
    clear: 'Clear',
    clearQuestion: 'Forget this conversation? It is kept nowhere else.',
    inputLabel: 'Your message',
    inputHint: 'Say something…',
    send: 'Send',
    stop: 'Stop',
    profile: 'Sampling',
    shade: 'Familiarity shade',
    shadeHint: 'Pale lines were either too expected (maybe quoted) or surprising to the model; says nothing about truth',
    expected: (ppl) => `perplexity ${ppl}`,
    you: 'You',
    empty: 'Nothing was said yet.',
    silent: '(no words)',
    failed: (text) => `No reply: ${text}`,
    again: 'Try again',
    keyTitle: 'This server asks for a key',
    keyLabel: 'API key',
    keySave: 'Use it',
    small: (size) => `A demo model of ${size} parameters: it imitates the story's wording and understands nothing.`,
    large: (size) => `A language model of ${size} parameters trained on one story: it can be wrong, and it is not the character.`,
    unknown: 'A language model trained on one story: it can be wrong, and it is not the character.',
    private: 'The server keeps no conversation.',
  },
  zh: {
    unofficial: 'AI · 非官方',
    retry: '立即重试',
    ok: '就绪',
    busy: (queue) => `忙碌：${queue.running} 路生成中，${queue.waiting} 个排队`,
    loading: '模型加载中',
    stopped: '引擎已停止，请重启服务',
    unreachable: (seconds) => `连不上服务，${seconds} 秒后重试`,
    connecting: '连接中',
    movie: '影院模式',
    movieHint: '一次只显示一行',
    log: '对话记录',
    stage: '影院模式',
    next: '下一行',
    auto: '自动 (A)',
    backlog: '回看 (L)',
    hide: '隐藏界面 (H)',
    leave: '离开 (Esc)',
    tools: '对话工具',
    swipe: '换一句',
    swipeHint: '对同一句话再要一个回复',
    previous: '上一个回复',
    following: '下一个回复',
    undo: '撤回',
    undoHint: '收回上一句话和它的回复',
    edit: '修改',
    editHint: '修改上一句话并重新发送',
    editing: '正在修改上一句话：回车重新发送，Esc 放弃修改。',
    copy: '复制',
    copyHint: '复制最后一个回复',
    copied: '已复制。',
    export: '导出',
    exportHint: '把对话存成 JSON 文件',
    clear: '清空',
    clearQuestion: '要忘掉这段对话吗？别处没有备份。',
    inputLabel: '你要说的话',
    inputHint: '说点什么吧……',
    send: '发送',
    stop: '停止',
    profile: '采样方案',
    shade: '熟悉度明暗',
    shadeHint: '变淡的行对模型来说要么过于熟悉（可能是原文），要么出乎意料；与真假无关',
    expected: (ppl) => `困惑度 ${ppl}`,
    you: '你',
    empty: '还没有说过话。',
    silent: '（没有说话）',
    failed: (text) => `没有回复：${text}`,
    again: '再试一次',
    keyTitle: '这个服务需要密钥',
    keyLabel: 'API 密钥',
    keySave: '使用',
    small: (size) => `这是一个 ${size}参数的演示模型：它只会模仿故事的用词，什么也不理解。`,
    large: (size) => `这是一个 ${size}参数、在一个故事上训练的语言模型：它会出错，也不是角色本人。`,
    unknown: '这是一个在一个故事上训练的语言模型：它会出错，也不是角色本人。',
    private: '服务器不保存任何对话。',
  },
};

// Codes under which a server may give texts in one of the page's languages, best first.
const CODES = { zh: ['zh', 'chs', 'cht', 'zh-Hans'], en: ['en'] };

const SMALL_MODEL = 100e6;

let current = localStorage.getItem('cyrene.language')
  ?? (navigator.language.toLowerCase().startsWith('zh') ? 'zh' : 'en');

export function language() {
  return current;
}

export function switchLanguage() {
  current = current === 'zh' ? 'en' : 'zh';
  localStorage.setItem('cyrene.language', current);
}

// The word for `key`; some need arguments.
export function word(key, ...args) {
  const found = WORDS[current][key];
  return typeof found === 'function' ? found(...args) : found;
}

// Writes the words into everything that names one.
export function translatePage() {
  document.documentElement.lang = current === 'zh' ? 'zh-Hans' : 'en';
  for (const element of document.querySelectorAll('[data-word]')) {
    element.textContent = word(element.dataset.word);
  }
  for (const element of document.querySelectorAll('[data-hint]')) {
    element.title = word(element.dataset.hint);
  }
  for (const element of document.querySelectorAll('[data-label]')) {
    element.setAttribute('aria-label', word(element.dataset.label));
  }
  for (const element of document.querySelectorAll('[data-placeholder]')) {
    element.placeholder = word(element.dataset.placeholder);
  }
}

// The text of a map by language code: this language, else `fallback`, else English, else any.
export function localized(map, fallback = '') {
  const texts = map ?? {};
  const own = CODES[current].find((code) => texts[code]);
  if (own) return texts[own];
  return fallback || texts.en || Object.values(texts)[0] || '';
}

// What kind of thing speaks here, plainly.
export function modelSentence(info) {
  const n = info.n_params;
  const sized = n > 0 ? word(n < SMALL_MODEL ? 'small' : 'large', size(n)) : word('unknown');
  const sentence = localized(info.note) || sized;
  return sentence + (current === 'zh' ? '' : ' ') + word('private');
}

function size(n) {
  const short = (value) => String(Number(value.toPrecision(2)));
  if (current === 'zh') {
    return n >= 1e8 ? `${short(n / 1e8)} 亿` : `${short(n / 1e4)} 万`;
  }
  return n >= 1e9 ? `${short(n / 1e9)} billion` : `${short(n / 1e6)} million`;
}
