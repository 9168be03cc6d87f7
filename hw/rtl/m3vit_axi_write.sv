// Writes runs of words: bursts of commands, as m3vit_axi_read makes them, and of words that come later in their order.
// `idle`: all is written, and answered. awsize, awburst, wstrb (all) and ids are left to the wrapper.
module m3vit_axi_write #(
    parameter int ADDRESS_BITS = 40,
    parameter int DATA_BITS = 128,
    parameter int BURST = 16,
    parameter int BURSTS = 128,  // in flight
    parameter int DEPTH = 64
) (
    input  logic                    clk,
    input  logic                    reset,
    input  logic                    command_valid,
    output logic                    command_ready,
    input  logic [ADDRESS_BITS-1:0] command_first,
    input  logic [            15:0] command_words,
    input  logic                    push,
    input  logic [   DATA_BITS-1:0] word,
    output logic [ $clog2(DEPTH):0] held,
    output logic                    idle,
    output logic                    awvalid,
    input  logic                    awready,
    output logic [ADDRESS_BITS-1:0] awaddr,
    output logic [             7:0] awlen,
    output logic                    wvalid,
    input  logic                    wready,
    output logic [   DATA_BITS-1:0] wdata,
    output logic                    wlast,
    input  logic                    bvalid,
    output logic                    bready
);
    localparam int BYTES = DATA_BITS / 8;
    localparam int SHIFT = $clog2(BYTES);
    localparam int PAGE = 4096 / BYTES;

    logic [15:0] sent, rest, most, size;
    logic [ADDRESS_BITS-1:0] at;
    logic issue, no_words, no_burst, burst_done;
    logic [$clog2(BURSTS):0] bursts, open;  // waiting for their words; not answered
    logic [7:0] length, beat;

    always_comb begin
        at = command_first + (ADDRESS_BITS'(sent) << SHIFT);
        rest = command_words - sent;
        most = 16'(PAGE) - 16'(at[11:SHIFT]);
        if (most > 16'(BURST)) most = 16'(BURST);
        size = rest < most ? rest : most;
        issue = command_valid && (!awvalid || awready) && open < ($clog2(BURSTS) + 1)'(BURSTS);
        command_ready = issue && size == rest;
        wvalid = !no_words && !no_burst;
        wlast = beat == length;
        burst_done = wvalid && wready && wlast;
    end
    always_ff @(posedge clk) begin
        if (reset) begin
            awvalid <= 0;
            sent <= 0;
            beat <= 0;
            open <= 0;
        end else begin
            if (awready) awvalid <= 0;
            if (issue) begin
                awvalid <= 1;
                sent <= command_ready ? 0 : sent + size;
            end
            if (wvalid && wready) beat <= wlast ? 0 : beat + 1;
            open <= open + ($clog2(BURSTS) + 1)'(issue) - ($clog2(BURSTS) + 1)'(bvalid);
        end
        if (issue) begin
            awaddr <= at;
            awlen <= 8'(size - 1);
        end
    end

    assign bready = 1;
    assign idle = open == 0 && !command_valid;
    m3vit_fifo #(
        .WIDTH(8),
        .DEPTH(BURSTS)
    ) lengths (
        .clk(clk),
        .reset(reset),
        .push(issue),
        .in(8'(size - 1)),
        .pop(burst_done),
        .out(length),
        .empty(no_burst),
        .held(bursts)
    );
    m3vit_fifo #(
        .WIDTH(DATA_BITS),
        .DEPTH(DEPTH)
    ) words (
        .clk(clk),
        .reset(reset),
        .push(push),
        .in(word),
        .pop(wvalid && wready),
        .out(wdata),
        .empty(no_words),
        .held(held)
    );
endmodule
