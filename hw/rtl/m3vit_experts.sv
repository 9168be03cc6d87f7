// The expert engine: both maps of every expert that has tokens, and what they give, weighted, added to the residual
// stream. The loop of hw/include/engine/m3vit_engine_compute.h for the instruction `experts`, as it is there: a step
// multiplies a token's inputs, TILE_IN of them by TILE_OUT outputs; writes a word of the token before; and loads a word
// of the next tile. A step is taken when all that it needs is there; a pass (the steps of a tile) ends when all that it
// writes is answered, and the next one begins.
//
// Values have A_BITS in memory, ACT_BITS of which they use; weights W_BITS; the residual stream 32. Addresses of the
// instruction (`src` to `hidden_pitch`) count values of their memories, and are whole words, as are n_in and n_out whole
// steps. Before `start` the router's choice is written: each expert's tokens with their weights, and where they begin.
//
// Of a pass with reads and writes, STAGES cycles are none of its steps and no latency of the memory.
module m3vit_experts #(
    parameter int PORT_BITS = 128,
    parameter int W_BITS = 8,
    parameter int A_BITS = 8,
    parameter int ACT_BITS = 8,
    parameter int PACKED = 1,
    parameter int TILE_IN = 16,
    parameter int TILE_OUT = 16,
    parameter int TOKEN_BLOCK = 32,
    parameter int MAX_IN = 64,
    parameter int QUEUE = 128,        // places: tokens times experts a token
    parameter int MAX_EXPERTS = 16,
    parameter int WEIGHT_PORTS = 1,
    parameter int RESULTS = 8,        // narrow ones in a cycle; of wide ones two words are
    parameter TILES = "block",        // what holds weights, and inputs
    parameter INPUTS = "block",
    parameter TABLE = "m3vit_gelu_gap.hex",
    parameter int ADDRESS_BITS = 40,
    localparam int EXPERT = $clog2(MAX_EXPERTS + 1),
    localparam int PLACE = $clog2(QUEUE)
) (
    input logic clk,
    input logic reset,

    // The router's choice.
    input logic              queue_write,
    input logic [ PLACE-1:0] queue_place,
    input logic [      15:0] queue_token,
    input logic [      17:0] queue_weight,
    input logic              start_write,
    input logic [EXPERT-1:0] start_expert,
    input logic [      15:0] start_place,

    // The instruction, and where the memories begin, in bytes.
    input  logic                    start,
    output logic                    done,       // for a cycle
    output logic                    pass_done,
    input  logic [            15:0] experts,
    input  logic [            15:0] n_in,
    input  logic [            15:0] n_out,
    input  logic [            31:0] src,
    input  logic [            31:0] src_pitch,
    input  logic [            31:0] dst,
    input  logic [            31:0] dst_pitch,
    input  logic [            31:0] weights,
    input  logic [            31:0] weights_step,
    input  logic [            31:0] params,
    input  logic [            31:0] params_step,
    input  logic [            31:0] hidden,
    input  logic [            31:0] hidden_pitch,
    input  logic [             4:0] gelu_in,
    input  logic [             4:0] gelu_out,
    input  logic [ADDRESS_BITS-1:0] weights_base,
    input  logic [ADDRESS_BITS-1:0] params_base,
    input  logic [ADDRESS_BITS-1:0] narrow_base,
    input  logic [ADDRESS_BITS-1:0] wide_base,

    // AXI4: those of weights are WEIGHT_PORTS side by side; keys is the second port of narrow inputs; wide words of a tile's
    // first half pass through wide_in and wide, the others through more_wide_in and more_wide.
    output logic [             WEIGHT_PORTS-1:0] weights_arvalid,
    input  logic [             WEIGHT_PORTS-1:0] weights_arready,
    output logic [WEIGHT_PORTS*ADDRESS_BITS-1:0] weights_araddr,
    output logic [           WEIGHT_PORTS*8-1:0] weights_arlen,
    input  logic [             WEIGHT_PORTS-1:0] weights_rvalid,
    output logic [             WEIGHT_PORTS-1:0] weights_rready,
    input  logic [   WEIGHT_PORTS*PORT_BITS-1:0] weights_rdata,

    output logic                    params_arvalid,
    input  logic                    params_arready,
    output logic [ADDRESS_BITS-1:0] params_araddr,
    output logic [             7:0] params_arlen,
    input  logic                    params_rvalid,
    output logic                    params_rready,
    input  logic [   PORT_BITS-1:0] params_rdata,

    output logic                    narrow_in_arvalid,
    input  logic                    narrow_in_arready,
    output logic [ADDRESS_BITS-1:0] narrow_in_araddr,
    output logic [             7:0] narrow_in_arlen,
    input  logic                    narrow_in_rvalid,
    output logic                    narrow_in_rready,
    input  logic [   PORT_BITS-1:0] narrow_in_rdata,

    output logic                    keys_arvalid,
    input  logic                    keys_arready,
    output logic [ADDRESS_BITS-1:0] keys_araddr,
    output logic [             7:0] keys_arlen,
    input  logic                    keys_rvalid,
    output logic                    keys_rready,
    input  logic [   PORT_BITS-1:0] keys_rdata,

    output logic                    wide_in_arvalid,
    input  logic                    wide_in_arready,
    output logic [ADDRESS_BITS-1:0] wide_in_araddr,
    output logic [             7:0] wide_in_arlen,
    input  logic                    wide_in_rvalid,
    output logic                    wide_in_rready,
    input  logic [   PORT_BITS-1:0] wide_in_rdata,

    output logic                    more_wide_in_arvalid,
    input  logic                    more_wide_in_arready,
    output logic [ADDRESS_BITS-1:0] more_wide_in_araddr,
    output logic [             7:0] more_wide_in_arlen,
    input  logic                    more_wide_in_rvalid,
    output logic                    more_wide_in_rready,
    input  logic [   PORT_BITS-1:0] more_wide_in_rdata,

    output logic                    narrow_out_awvalid,
    input  logic                    narrow_out_awready,
    output logic [ADDRESS_BITS-1:0] narrow_out_awaddr,
    output logic [             7:0] narrow_out_awlen,
    output logic                    narrow_out_wvalid,
    input  logic                    narrow_out_wready,
    output logic [   PORT_BITS-1:0] narrow_out_wdata,
    output logic                    narrow_out_wlast,
    input  logic                    narrow_out_bvalid,
    output logic                    narrow_out_bready,

    output logic                    wide_awvalid,
    input  logic                    wide_awready,
    output logic [ADDRESS_BITS-1:0] wide_awaddr,
    output logic [             7:0] wide_awlen,
    output logic                    wide_wvalid,
    input  logic                    wide_wready,
    output logic [   PORT_BITS-1:0] wide_wdata,
    output logic                    wide_wlast,
    input  logic                    wide_bvalid,
    output logic                    wide_bready,

    output logic                    more_wide_awvalid,
    input  logic                    more_wide_awready,
    output logic [ADDRESS_BITS-1:0] more_wide_awaddr,
    output logic [             7:0] more_wide_awlen,
    output logic                    more_wide_wvalid,
    input  logic                    more_wide_wready,
    output logic [   PORT_BITS-1:0] more_wide_wdata,
    output logic                    more_wide_wlast,
    input  logic                    more_wide_bvalid,
    output logic                    more_wide_bready
);
    localparam int SUM_BITS = 48;
    localparam int SHIFT = $clog2(PORT_BITS / 8);
    localparam int NARROW = PORT_BITS / A_BITS;  // values of a word
    localparam int WIDE = PORT_BITS / 32;
    localparam int LANES = PORT_BITS / W_BITS;
    localparam int JOINED = TILE_IN / NARROW;    // words of inputs of a step,
    localparam int PORTS = JOINED > 1 ? 2 : 1;   // and the ports they come through
    localparam int LEAD = 2, LEAST_SPAN = 8;     // tokens a port is ahead by; steps of a token that is read, at least
    localparam int BANKS = TILE_IN / LANES;
    localparam int TILE_DEPTH = MAX_IN / TILE_IN;
    localparam int ROW = TILE_DEPTH > 1 ? $clog2(TILE_DEPTH) : 1;
    localparam int CACHE = TOKEN_BLOCK * MAX_IN / TILE_IN / PORTS;
    localparam int CACHE_AT = $clog2(CACHE);
    localparam int SECOND = (TILE_OUT / NARROW + 1) / 2 * NARROW;  // the array's rows from here on: the second half
    localparam int PARAMS = SECOND / RESULTS;  // rows of results, and of their parameters, of a tile's half
    localparam int PARAM = PARAMS > 1 ? $clog2(PARAMS) : 1;
    localparam int FOLD = RESULTS / WIDE;        // wide words of a row of results
    localparam int GATHER = NARROW / RESULTS;    // steps of a narrow word
    localparam int FOLD_BITS = FOLD > 1 ? $clog2(FOLD) : 1;
    localparam int OUT_DEPTH = 64;

    // From a step on: its products' sums; the results' way to the queue of what is written.
    localparam int SUMMED = 10;
    localparam int SELECTED = 2, ROUNDED = 5, GELU = 10;
    localparam int ALIVE = SUMMED + SELECTED + ROUNDED + GELU + 2;  // and through that queue
    localparam int WALKED = 4;  // from a pass's start to its first address

    // --- jobs: the tile that is multiplied (`now`), and the next, which is loaded ---------------------------------

    logic plan_valid, plan_finished, plan_take, plan_second;
    logic [EXPERT-1:0] plan_expert;
    logic [15:0] plan_inputs, plan_outputs, plan_row, plan_base, plan_first, plan_count;
    m3vit_plan #(
        .TILE_OUT(TILE_OUT),
        .TOKEN_BLOCK(TOKEN_BLOCK),
        .MAX_EXPERTS(MAX_EXPERTS)
    ) plan (
        .clk(clk),
        .reset(reset),
        .start_write(start_write),
        .start_expert(start_expert),
        .start_place(start_place),
        .start(start),
        .experts(experts),
        .n_in(n_in),
        .n_out(n_out),
        .take(plan_take),
        .valid(plan_valid),
        .finished(plan_finished),
        .expert(plan_expert),
        .second(plan_second),
        .inputs(plan_inputs),
        .outputs(plan_outputs),
        .row(plan_row),
        .base(plan_base),
        .first(plan_first),
        .count(plan_count)
    );

    typedef enum logic [2:0] {
        IDLE,
        PLAN,
        ASK,
        STEPS,
        DRAIN
    } state_t;
    state_t state;
    logic side;               // of the tiles: multiplied; the other is loaded
    logic computing, loading;  // a pass may do one of both: the first only loads, the last only multiplies
    logic now_second, now_fresh;
    logic [15:0] now_inputs, now_outputs, now_row, now_base, now_first, now_count;
    logic next_fresh, next_second;
    logic [15:0] next_inputs, next_outputs, next_row, next_base, next_first, next_count;
    logic [15:0] now_half, next_half;  // outputs of the first half
    logic [ADDRESS_BITS-1:0] expert_weights, expert_params;
    logic [EXPERT-1:0] expert_at;
    logic [2:0] asking;
    logic pass_start, asked, step, steps_end, drained;

    assign plan_take = state == PLAN && plan_valid && expert_at == plan_expert;
    assign pass_start = plan_take || (state == PLAN && plan_finished && computing_next);
    logic computing_next;  // the pass that begins has a tile to multiply

    always_ff @(posedge clk) begin
        done <= 0;
        pass_done <= 0;
        if (reset) state <= IDLE;
        else
            case (state)
                IDLE:
                if (start) begin
                    state <= PLAN;
                    side <= 1;  // the first tile goes into side 0
                    computing_next <= 0;
                    expert_at <= 0;
                    expert_weights <= weights_base + (ADDRESS_BITS'(weights / LANES) << SHIFT);
                    expert_params <= params_base + (ADDRESS_BITS'(params / WIDE) << SHIFT);
                end
                PLAN:
                if (plan_valid && expert_at != plan_expert) begin  // the experts without tokens in between
                    expert_at <= expert_at + 1;
                    expert_weights <= expert_weights + (ADDRESS_BITS'(weights_step / LANES) << SHIFT);
                    expert_params <= expert_params + (ADDRESS_BITS'(params_step / WIDE) << SHIFT);
                end else if (pass_start) begin
                    state <= ASK;
                    asking <= 3'(WALKED);
                    computing <= computing_next;
                    computing_next <= plan_valid;
                    loading <= plan_valid;
                    side <= !side;
                end else if (plan_finished) begin
                    state <= IDLE;
                    done <= 1;
                end
                ASK: begin
                    asking <= asking - 1;
                    if (asking == 0) state <= STEPS;
                end
                STEPS: if (steps_end) state <= DRAIN;
                DRAIN:
                if (drained) begin
                    state <= PLAN;
                    pass_done <= 1;
                end
                default: state <= IDLE;
            endcase
        if (pass_start) begin
            {now_second, now_fresh} <= {next_second, next_fresh};
            {now_inputs, now_outputs, now_row} <= {next_inputs, next_outputs, next_row};
            {now_base, now_first, now_count} <= {next_base, next_first, next_count};
            {next_second, next_fresh} <= {plan_second, plan_row == 0};
            {next_inputs, next_outputs, next_row} <= {plan_inputs, plan_outputs, plan_row};
            {next_base, next_first, next_count} <= {plan_base, plan_first, plan_count};
        end
    end
    assign asked = state == ASK && asking == 0;
    assign next_half = (next_outputs / 16'(NARROW) + 16'd1) / 16'd2 * 16'(NARROW);
    always_ff @(posedge clk) if (pass_start) now_half <= next_half;

    // --- loading --------------------------------------------------------------------------------------------------

    logic load_more, load_ready;
    logic [TILE_OUT-1:0] write_output;
    logic [BANKS-1:0] write_bank;
    logic [ROW-1:0] write_at;
    logic [WEIGHT_PORTS*PORT_BITS-1:0] write_data;
    logic [2*RESULTS-1:0] write_params;
    logic [PARAM-1:0] params_at;
    logic [RESULTS*64-1:0] params_data;
    m3vit_load #(
        .ADDRESS_BITS(ADDRESS_BITS),
        .PORT_BITS(PORT_BITS),
        .W_BITS(W_BITS),
        .COLUMNS(RESULTS),
        .TILE_OUT(TILE_OUT),
        .BANKS(BANKS),
        .DEPTH(TILE_DEPTH),
        .PORTS(WEIGHT_PORTS),
        .SECOND(SECOND),
        .PARAMS(PARAMS)
    ) load (
        .clk(clk),
        .reset(reset),
        .start(asked && loading),
        .fresh(next_fresh),
        .again(next_base != 0),
        .second(next_second),
        .inputs(next_inputs),
        .outputs(next_outputs),
        .half(next_half),
        .weights(expert_weights),
        .params(expert_params),
        .more(load_more),
        .ready(load_ready),
        .step(step && loading),
        .write_output(write_output),
        .write_bank(write_bank),
        .write_at(write_at),
        .write_data(write_data),
        .write_params(write_params),
        .params_at(params_at),
        .params_data(params_data),
        .arvalid(weights_arvalid),
        .arready(weights_arready),
        .araddr(weights_araddr),
        .arlen(weights_arlen),
        .rvalid(weights_rvalid),
        .rready(weights_rready),
        .rdata(weights_rdata),
        .params_arvalid(params_arvalid),
        .params_arready(params_arready),
        .params_araddr(params_araddr),
        .params_arlen(params_arlen),
        .params_rvalid(params_rvalid),
        .params_rready(params_rready),
        .params_rdata(params_rdata)
    );

    // --- rows of tokens: requests for inputs and for what is added to, addresses of results --------------------------

    logic walking, walk_valid, walk_ready, walk_port;
    logic [ADDRESS_BITS-1:0] inputs_at, results_at, scattered, dense;
    logic [17:0] walk_weight;
    logic [24:0] pitch;
    logic [15:0] input_words, result_words, more_words;  // of a token's row; of its results, in each half
    assign pitch = now_second ? 25'(dst_pitch / WIDE) : 25'(src_pitch / NARROW);
    assign scattered = now_second
        ? wide_base + (ADDRESS_BITS'((dst + 32'(now_row)) / WIDE) << SHIFT)
        : narrow_base + (ADDRESS_BITS'(src / NARROW) << SHIFT);
    assign dense = narrow_base + (ADDRESS_BITS'((hidden + (now_second ? 0 : 32'(now_row))) / NARROW) << SHIFT);
    assign input_words = now_inputs / 16'(NARROW);
    assign result_words = now_second ? now_half / 16'(WIDE) : now_outputs / 16'(NARROW);
    assign more_words = (now_outputs - now_half) / 16'(WIDE);
    m3vit_walk #(
        .ADDRESS_BITS(ADDRESS_BITS),
        .PORT_BITS(PORT_BITS),
        .PORTS(PORTS),
        .QUEUE(QUEUE)
    ) walk (
        .clk(clk),
        .reset(reset),
        .queue_write(queue_write),
        .queue_place(queue_place),
        .queue_token(queue_token),
        .queue_weight(queue_weight),
        .start(state == ASK && asking == 3'(WALKED) && computing),
        .second(now_second),
        .first(now_first),
        .base(now_base),
        .count(now_count),
        .scattered(scattered),
        .pitch(pitch),
        .dense(dense),
        .dense_pitch(25'(hidden_pitch / NARROW)),
        .ready(walk_ready),
        .busy(walking),
        .valid(walk_valid),
        .port(walk_port),
        .inputs_at(inputs_at),
        .results_at(results_at),
        .weight(walk_weight)
    );

    // Rows that were walked and not asked for yet; weights of tokens that were not written yet.
    localparam int AHEAD = 32, WEIGHTS = 128;
    logic [$clog2(AHEAD):0] rows_held[0:5];
    logic [5:0] row_push, row_pop, row_empty;  // of narrow_in, keys, wide_in, more_wide_in; of results, and of more
    logic [ADDRESS_BITS-1:0] row_in[0:5], row_out[0:5], more_at;
    logic more_results;
    logic [$clog2(WEIGHTS):0] weights_held;
    logic [17:0] token_weight;
    logic weight_pop, no_weight;
    assign more_results = now_second && now_half < now_outputs;
    assign more_at = results_at + (ADDRESS_BITS'(result_words) << SHIFT);
    assign row_push = {6{walk_valid}} & {more_results, 1'b1, more_results, now_second, now_fresh && walk_port, now_fresh && !walk_port};
    always_comb begin
        row_in[0] = inputs_at;
        row_in[1] = inputs_at;
        row_in[2] = results_at;
        row_in[3] = more_at;
        row_in[4] = results_at;
        row_in[5] = more_at;
        walk_ready = weights_held < ($clog2(WEIGHTS) + 1)'(WEIGHTS - 8);
        for (int r = 0; r < 6; r++) if (rows_held[r] >= ($clog2(AHEAD) + 1)'(AHEAD - 8)) walk_ready = 0;
    end
    for (genvar r = 0; r < 6; r++) begin : row_queue
        m3vit_fifo #(
            .WIDTH(ADDRESS_BITS),
            .DEPTH(AHEAD)
        ) queue (
            .clk(clk),
            .reset(reset),
            .push(row_push[r]),
            .in(row_in[r]),
            .pop(row_pop[r]),
            .out(row_out[r]),
            .empty(row_empty[r]),
            .held(rows_held[r])
        );
    end
    m3vit_fifo #(
        .WIDTH(18),
        .DEPTH(WEIGHTS)
    ) weight_queue (
        .clk(clk),
        .reset(reset),
        .push(walk_valid && now_second),
        .in(walk_weight),
        .pop(weight_pop),
        .out(token_weight),
        .empty(no_weight),
        .held(weights_held)
    );

    logic [3:0] in_arvalid, in_arready, in_rvalid, in_rready, in_valid, in_pop;  // in the order of their rows
    logic [ADDRESS_BITS-1:0] in_araddr[0:3];
    logic [7:0] in_arlen[0:3];
    logic [PORT_BITS-1:0] in_rdata[0:3], in_word[0:3];
    logic [7:0] in_held[0:3];
    for (genvar r = 0; r < 4; r++) begin : reading
        m3vit_axi_read #(
            .ADDRESS_BITS(ADDRESS_BITS),
            .DATA_BITS(PORT_BITS)
        ) read (
            .clk(clk),
            .reset(reset),
            .command_valid(!row_empty[r]),
            .command_ready(row_pop[r]),
            .command_first(row_out[r]),
            .command_words(r < 2 ? input_words : r == 2 ? result_words : more_words),
            .word(in_word[r]),
            .word_valid(in_valid[r]),
            .held(in_held[r]),
            .pop(in_pop[r]),
            .arvalid(in_arvalid[r]),
            .arready(in_arready[r]),
            .araddr(in_araddr[r]),
            .arlen(in_arlen[r]),
            .rvalid(in_rvalid[r]),
            .rready(in_rready[r]),
            .rdata(in_rdata[r])
        );
    end
    assign {more_wide_in_arvalid, wide_in_arvalid, keys_arvalid, narrow_in_arvalid} = in_arvalid;
    assign in_arready = {more_wide_in_arready, wide_in_arready, keys_arready, narrow_in_arready};
    assign {more_wide_in_rready, wide_in_rready, keys_rready, narrow_in_rready} = in_rready;
    assign in_rvalid = {more_wide_in_rvalid, wide_in_rvalid, keys_rvalid, narrow_in_rvalid};
    assign narrow_in_araddr = in_araddr[0];
    assign keys_araddr = in_araddr[1];
    assign wide_in_araddr = in_araddr[2];
    assign more_wide_in_araddr = in_araddr[3];
    assign narrow_in_arlen = in_arlen[0];
    assign keys_arlen = in_arlen[1];
    assign wide_in_arlen = in_arlen[2];
    assign more_wide_in_arlen = in_arlen[3];
    assign in_rdata[0] = narrow_in_rdata;
    assign in_rdata[1] = keys_rdata;
    assign in_rdata[2] = wide_in_rdata;
    assign in_rdata[3] = more_wide_in_rdata;

    // --- steps ----------------------------------------------------------------------------------------------------

    logic [15:0] n, i, steps, reads, results, span, least, ahead;
    logic [ROW-1:0] at_row;
    logic [PARAM-1:0] result_row;
    logic [FOLD_BITS-1:0] result_fold;
    logic [7:0] gathering;                  // results of a narrow word that are there
    logic result_half, more, completes;
    logic [15:0] fill_bank, filled;         // the word of inputs that is read; tokens read before it
    logic [CACHE_AT-1:0] fill_at, kept_at;  // in the memories that keep inputs
    logic passing, multiplies, writes, last, room, may, odd;
    logic [1:0] fills;                      // words of inputs that a step reads
    logic [6:0] out_held, wide_held, more_held, promised;  // words of results; those that steps will give
    logic [7:0] olds_promised, mores_promised;  // words of wide_in, more_wide_in that steps will take
    logic out_push, more_push, old_pop, more_pop;
    assign steps = now_inputs / 16'(TILE_IN);
    assign reads = now_fresh ? input_words / 16'(PORTS) : 0;  // of a token, in a pass over its steps
    assign ahead = now_fresh ? 16'(LEAD * PORTS) : 0;
    assign results = now_second ? result_words : now_outputs / 16'(RESULTS);
    always_comb begin
        least = now_fresh ? (reads > 16'(LEAST_SPAN) ? reads : 16'(LEAST_SPAN)) : 0;
        span = steps > results ? steps : results;
        if (least > span) span = least;
    end
    assign passing = computing && n <= now_count + ahead;
    assign multiplies = passing && n >= ahead && n < now_count + ahead && i < steps;
    assign writes = passing && n > ahead && i < results;
    assign filled = PORTS == 1 ? n : {n[15:1], 1'b0};
    assign fills[0] = passing && i < reads && filled < now_count;
    assign fills[1] = passing && i < reads && PORTS == 2 && filled + 1 < now_count;
    assign odd = PORTS == 2 && n[0];  // ahead is even
    assign last = i + 1 == span;
    assign more = more_results && i < more_words;
    assign completes = now_second || gathering == 8'(GATHER - 1);
    assign room = (now_second ? wide_held : out_held) + promised < 7'(OUT_DEPTH)
               && more_held + promised < 7'(OUT_DEPTH);
    assign may = (fills & ~in_valid[1:0]) == 0
              && (!writes || (room && (!now_second || (in_held[2] > olds_promised && (!more || in_held[3] > mores_promised)))))
              && (!loading || !load_more || load_ready);
    assign step = state == STEPS && may && !steps_end;
    assign steps_end = state == STEPS && !passing && !(loading && load_more);
    assign in_pop = {more_pop, old_pop, step ? fills : 2'd0};

    always_ff @(posedge clk) begin
        if (state == ASK) begin
            n <= 0;
            i <= 0;
            at_row <= 0;
            fill_bank <= 0;
            fill_at <= 0;
            kept_at <= 0;
            result_row <= 0;
            result_fold <= 0;
            result_half <= 0;
            gathering <= 0;
        end else if (step && passing) begin
            i <= last ? 0 : i + 1;
            if (last) n <= n + 1;
            if (fills != 0) begin
                fill_bank <= fill_bank + 1 == 16'(JOINED) ? 0 : fill_bank + 1;
                if (fill_bank + 1 == 16'(JOINED)) fill_at <= fill_at + 1;
            end
            if (multiplies) at_row <= at_row + 1;
            if (writes) begin
                result_fold <= now_second && result_fold != FOLD_BITS'(FOLD - 1) ? result_fold + 1 : 0;
                gathering <= completes ? 0 : gathering + 1;
                if (now_second ? result_fold == FOLD_BITS'(FOLD - 1) : 16'(result_row + 1) * 16'(RESULTS) != now_half || result_half)
                    result_row <= result_row + 1;
                else if (!now_second) begin
                    result_row <= 0;
                    result_half <= 1;
                end
            end
            if (last) begin
                at_row <= 0;
                result_row <= 0;
                result_fold <= 0;
                result_half <= 0;
                gathering <= 0;
                if (n >= ahead && (PORTS == 1 || odd)) kept_at <= kept_at + CACHE_AT'(steps);
            end
        end
        if (reset) begin
            promised <= 0;
            olds_promised <= 0;
            mores_promised <= 0;
        end else begin
            promised <= promised + 7'(step && writes && completes) - 7'(out_push);
            olds_promised <= olds_promised + 8'(step && writes && now_second) - 8'(old_pop);
            mores_promised <= mores_promised + 8'(step && writes && more) - 8'(more_pop);
        end
    end

    // Steps on their way, and whether all is written.
    logic [ALIVE:0] alive;
    logic narrow_idle, wide_idle, more_idle;
    always_ff @(posedge clk) alive <= reset ? 0 : {alive[ALIVE-1:0], step};
    assign drained = computing ? alive == 0 && !walking && narrow_idle && wide_idle && more_idle : alive[1:0] == 0;

    // --- operands: inputs are kept for all tiles of a block; tokens of each port have memories of their own ---------

    logic odd_1;
    logic [JOINED*PORT_BITS-1:0] kept[0:PORTS-1];
    logic [JOINED*PORT_BITS-1:0] x, skewed;
    for (genvar p = 0; p < PORTS; p++) begin : inputs
        for (genvar j = 0; j < JOINED; j++) begin : bank
            m3vit_ram #(
                .WIDTH(PORT_BITS),
                .DEPTH(CACHE),
                .STYLE(INPUTS)
            ) cache (
                .clk(clk),
                .write(step && fills[p] && fill_bank == 16'(j)),
                .write_at(fill_at),
                .data(in_word[p]),
                .read_at(kept_at + CACHE_AT'(at_row)),
                .word(kept[p][j*PORT_BITS+:PORT_BITS])
            );
        end
    end
    always_ff @(posedge clk) begin
        odd_1 <= odd;
        x <= odd_1 ? kept[PORTS-1] : kept[0];
    end
    m3vit_skew #(
        .BITS (A_BITS),
        .COUNT(TILE_IN)
    ) skew (
        .clk(clk),
        .in(x),
        .out(skewed)
    );

    // --- the array ------------------------------------------------------------------------------------------------

    logic add, first, hold;
    logic [TILE_OUT*SUM_BITS-1:0] sums;
    m3vit_delay #(
        .BITS(3),
        .CYCLES(SUMMED)
    ) summed (
        .clk(clk),
        .reset(reset),
        .in({step && multiplies, step && passing && i == 0, step && passing && last}),
        .out({add, first, hold})
    );
    for (genvar p = 0; p < TILE_OUT / 2; p++) begin : array
        m3vit_pair #(
            .TILE_IN(TILE_IN),
            .W_BITS(W_BITS),
            .A_BITS(A_BITS),
            .PORT_BITS(PORT_BITS),
            .DEPTH(2 << ROW),
            .PACKED(PACKED),
            .STYLE(TILES),
            .SUM_BITS(SUM_BITS)
        ) pair (
            .clk(clk),
            .write({write_bank & {BANKS{write_output[2*p+1]}}, write_bank & {BANKS{write_output[2*p]}}}),
            .write_at({!side, write_at}),
            .data(write_data[(2*p<SECOND?0:WEIGHT_PORTS-1)*PORT_BITS+:PORT_BITS]),
            .read_at({side, at_row}),
            .x(skewed),
            .add(add),
            .first(first),
            .last(hold),
            .sums(sums[2*p*SUM_BITS+:2*SUM_BITS])
        );
    end

    // --- results --------------------------------------------------------------------------------------------------

    // A row of each half, RESULTS side by side with their parameters; of these the narrow ones of a step, or a wide word of
    // each half.
    logic write_0, push_0, more_0, last_0, half_0, half_1;
    logic [PARAM-1:0] row_0;
    logic [FOLD_BITS-1:0] fold_0, fold_1;
    logic [7:0] gather_0;
    logic [RESULTS*SUM_BITS-1:0] sums_1[0:1];
    logic [RESULTS*45-1:0] params_1[0:1];
    logic [RESULTS*32-1:0] rounded;
    m3vit_delay #(
        .BITS(13 + FOLD_BITS + PARAM),
        .CYCLES(SUMMED)
    ) selected (
        .clk(clk),
        .reset(reset),
        .in({step && writes, step && writes && completes, step && writes && more, i + 16'd1 == results, result_half, gathering, result_fold, result_row}),
        .out({write_0, push_0, more_0, last_0, half_0, gather_0, fold_0, row_0})
    );
    logic [RESULTS*SUM_BITS-1:0] sums_of[0:2*PARAMS-1];
    for (genvar r = 0; r < PARAMS; r++) begin : result
        assign sums_of[r] = sums[r*RESULTS*SUM_BITS+:RESULTS*SUM_BITS];
        if (SECOND + (r + 1) * RESULTS <= TILE_OUT) begin : second
            assign sums_of[PARAMS+r] = sums[(SECOND+r*RESULTS)*SUM_BITS+:RESULTS*SUM_BITS];
        end else begin : none
            assign sums_of[PARAMS+r] = 0;
        end
    end
    logic [RESULTS*SUM_BITS-1:0] sums_first[0:PARAMS-1], sums_second[0:PARAMS-1];
    for (genvar r = 0; r < PARAMS; r++) begin : halves
        assign sums_first[r] = sums_of[r];
        assign sums_second[r] = sums_of[PARAMS+r];
    end
    always_ff @(posedge clk) begin
        sums_1[0] <= sums_first[row_0];
        sums_1[1] <= sums_second[row_0];
        fold_1 <= fold_0;
        half_1 <= half_0;
    end
    for (genvar l = 0; l < RESULTS; l++) begin : lane
        logic [7:0] shifts;
        logic [6:0] distance;  // shift + 31, and what is below 0 or above 79 gives what these do
        assign shifts = params_data[l*64+32+:8];
        assign distance = shifts < 33 ? 0 : shifts > 112 ? 79 : 7'(shifts - 33);
        for (genvar h = 0; h < 2; h++) begin : half
            m3vit_ram #(
                .WIDTH(45),
                .DEPTH(2 << PARAM),
                .STYLE("distributed")
            ) parameters (
                .clk(clk),
                .write(write_params[h*RESULTS+l]),
                .write_at({!side, params_at}),
                .data({params_data[l*64+:32], params_data[l*64+40+:6], distance}),
                .read_at({side, row_0}),
                .word(params_1[h][l*45+:45])
            );
        end
        logic [SUM_BITS-1:0] sum_2;
        logic [44:0] params_2;
        logic [SUM_BITS+44:0] narrow;
        assign narrow = {sums_1[half_1][l*SUM_BITS+:SUM_BITS], params_1[half_1][l*45+:45]};
        if (l < 2 * WIDE) begin : both  // lane l % WIDE of a wide word of half l / WIDE
            logic [SUM_BITS+44:0] folded[0:FOLD-1];
            for (genvar f = 0; f < FOLD; f++) begin : part
                assign folded[f] = {
                    sums_1[l/WIDE][(f*WIDE+l%WIDE)*SUM_BITS+:SUM_BITS], params_1[l/WIDE][(f*WIDE+l%WIDE)*45+:45]
                };
            end
            always_ff @(posedge clk) {sum_2, params_2} <= now_second ? folded[fold_1] : narrow;
        end else begin : narrow_only
            always_ff @(posedge clk) {sum_2, params_2} <= narrow;
        end
        m3vit_round #(
            .SUM_BITS(SUM_BITS)
        ) round (
            .clk(clk),
            .sum(sum_2),
            .bias(params_2[44:13]),
            .bias_shift(params_2[12:7]),
            .distance(params_2[6:0]),
            .result(rounded[l*32+:32])
        );
    end

    // Hidden channels: gathered to words.
    logic [PORT_BITS-1:0] narrow_word, gathered;
    logic [RESULTS*A_BITS-1:0] values;
    logic [7:0] gather_last;
    for (genvar l = 0; l < RESULTS; l++) begin : narrow_way
        logic signed [ACT_BITS-1:0] value;
        m3vit_gelu #(
            .ACT_BITS(ACT_BITS),
            .TABLE(TABLE)
        ) gelu (
            .clk(clk),
            .result(rounded[l*32+:32]),
            .frac_in(gelu_in),
            .frac_out(gelu_out),
            .value(value)
        );
        assign values[l*A_BITS+:A_BITS] = A_BITS'(value);
    end
    for (genvar g = 0; g < GATHER; g++) begin : gather
        assign narrow_word[g*RESULTS*A_BITS+:RESULTS*A_BITS] =
            gather_last == 8'(g) ? values : gathered[g*RESULTS*A_BITS+:RESULTS*A_BITS];
        always_ff @(posedge clk) if (gather_last == 8'(g)) gathered[g*RESULTS*A_BITS+:RESULTS*A_BITS] <= values;
    end

    // The residual stream: a token's weight is that of all its words; what is added to comes when the product is there.
    logic scale_0, scale_last;
    m3vit_delay #(
        .BITS(2),
        .CYCLES(SELECTED + ROUNDED)
    ) scaled (
        .clk(clk),
        .reset(reset),
        .in({write_0 && now_second, last_0}),
        .out({scale_0, scale_last})
    );
    assign weight_pop = scale_0 && scale_last;
    m3vit_delay #(
        .BITS(2),
        .CYCLES(SELECTED + ROUNDED + 5)
    ) olds (
        .clk(clk),
        .reset(reset),
        .in({write_0 && now_second, more_0}),
        .out({old_pop, more_pop})
    );
    logic [2*PORT_BITS-1:0] added, wide_words;
    for (genvar l = 0; l < 2 * WIDE; l++) begin : wide_lane
        m3vit_scale scale (
            .clk(clk),
            .result(rounded[l*32+:32]),
            .weight(token_weight),
            .old(in_word[2+l/WIDE][l%WIDE*32+:32]),
            .sum(added[l*32+:32])
        );
    end
    m3vit_delay #(
        .BITS(2 * PORT_BITS),
        .CYCLES(GELU - 7)  // as long as the way of hidden channels
    ) wide_way (
        .clk(clk),
        .reset(1'b0),
        .in(added),
        .out(wide_words)
    );

    m3vit_delay #(
        .BITS(10),
        .CYCLES(SELECTED + ROUNDED + GELU)
    ) pushed (
        .clk(clk),
        .reset(reset),
        .in({push_0, more_0, gather_0}),
        .out({out_push, more_push, gather_last})
    );
    m3vit_axi_write #(
        .ADDRESS_BITS(ADDRESS_BITS),
        .DATA_BITS(PORT_BITS),
        .DEPTH(OUT_DEPTH)
    ) narrow_write (
        .clk(clk),
        .reset(reset),
        .command_valid(!row_empty[4] && !now_second),
        .command_ready(narrow_ready),
        .command_first(row_out[4]),
        .command_words(result_words),
        .push(out_push && !now_second),
        .word(narrow_word),
        .held(out_held),
        .idle(narrow_idle),
        .awvalid(narrow_out_awvalid),
        .awready(narrow_out_awready),
        .awaddr(narrow_out_awaddr),
        .awlen(narrow_out_awlen),
        .wvalid(narrow_out_wvalid),
        .wready(narrow_out_wready),
        .wdata(narrow_out_wdata),
        .wlast(narrow_out_wlast),
        .bvalid(narrow_out_bvalid),
        .bready(narrow_out_bready)
    );
    logic narrow_ready, wide_ready;
    assign row_pop[4] = now_second ? wide_ready : narrow_ready;
    m3vit_axi_write #(
        .ADDRESS_BITS(ADDRESS_BITS),
        .DATA_BITS(PORT_BITS),
        .DEPTH(OUT_DEPTH)
    ) wide_write (
        .clk(clk),
        .reset(reset),
        .command_valid(!row_empty[4] && now_second),
        .command_ready(wide_ready),
        .command_first(row_out[4]),
        .command_words(result_words),
        .push(out_push && now_second),
        .word(wide_words[0+:PORT_BITS]),
        .held(wide_held),
        .idle(wide_idle),
        .awvalid(wide_awvalid),
        .awready(wide_awready),
        .awaddr(wide_awaddr),
        .awlen(wide_awlen),
        .wvalid(wide_wvalid),
        .wready(wide_wready),
        .wdata(wide_wdata),
        .wlast(wide_wlast),
        .bvalid(wide_bvalid),
        .bready(wide_bready)
    );
    logic more_ready;
    assign row_pop[5] = more_ready;
    m3vit_axi_write #(
        .ADDRESS_BITS(ADDRESS_BITS),
        .DATA_BITS(PORT_BITS),
        .DEPTH(OUT_DEPTH)
    ) more_wide_write (
        .clk(clk),
        .reset(reset),
        .command_valid(!row_empty[5]),
        .command_ready(more_ready),
        .command_first(row_out[5]),
        .command_words(more_words),
        .push(more_push),
        .word(wide_words[PORT_BITS+:PORT_BITS]),
        .held(more_held),
        .idle(more_idle),
        .awvalid(more_wide_awvalid),
        .awready(more_wide_awready),
        .awaddr(more_wide_awaddr),
        .awlen(more_wide_awlen),
        .wvalid(more_wide_wvalid),
        .wready(more_wide_wready),
        .wdata(more_wide_wdata),
        .wlast(more_wide_wlast),
        .bvalid(more_wide_bvalid),
        .bready(more_wide_bready)
    );
endmodule
